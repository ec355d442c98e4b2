"""Report a run: summary.json, plots and one self-contained page, of whatever has been made."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def report(experiment: Experiment) -> None:
    from llkd_ray import storage
    from llkd_ray.lineage import Lineage
    from llkd_ray.report.page import write_report
    from llkd_ray.report.summary import result_lines

    lineage = Lineage(experiment)
    summary = write_report(lineage)
    print("\n".join(result_lines(summary)))
    print(storage.address(lineage.run / "report.html"))


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), report))
