"""Turn a source of texts into a corpus: distinct, split, with stable row ids."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def prepare(experiment: Experiment) -> None:
    from dataclasses import asdict

    from llkd_ray import corpus
    from llkd_ray.artifacts import make
    from llkd_ray.lineage import Lineage

    artifact = Lineage(experiment).corpus
    if artifact.made:
        print(f"prepare: {artifact} is there already")
        return
    with make(artifact) as draft:
        prepared = corpus.prepare(experiment.corpus, experiment.task, draft.folder)
        draft.rows = prepared.rows
        counts = asdict(prepared)
        draft.details = {**counts.pop("splits"), **counts}
    splits = ", ".join(f"{rows} {split}" for split, rows in prepared.splits.items())
    print(f"prepare: wrote {artifact}: {splits}, {prepared.rejected} rejected")


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), prepare))
