"""Train many rules on the same labels, with several seeds, and write one table of them."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def compare(experiment: Experiment) -> None:
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.corpus.require()
    lineage.labels.require()
    lineage.labelled.require()
    artifact = lineage.comparison
    if artifact.made:
        print((artifact.require().path / "table.txt").read_text(encoding="utf-8"), end="")
        print(f"compare: {artifact} is there already")
        return

    from llkd_ray.artifacts import Rows, make, write_text
    from llkd_ray.cluster import ray_session
    from llkd_ray.compare.page import as_text
    from llkd_ray.compare.run import compare as run

    with make(artifact) as draft, ray_session(experiment.ray):
        compared = run(lineage, draft.folder)
        table = as_text(compared.lines, compared.teacher)
        write_text(draft.folder / "table.txt", table)
        draft.rows = Rows(taken=compared.test_rows, kept=compared.test_rows, rejected=0)
    print(table, end="")
    trials = sum(line.seeds for line in compared.lines if line.criterion == "last")
    print(
        f"compare: wrote {artifact}: {trials} trials on {compared.test_rows} gold test rows; "
        "table.txt, table.json, curves.svg"
    )


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), compare))
