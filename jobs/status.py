"""Tell how a run stands: what is made, what runs, what failed, what it cost, what is left over."""

import sys
from datetime import UTC, datetime
from typing import Any

from llkd_ray.cli import answer, parser_of
from llkd_ray.config import Experiment


def status(experiment: Experiment) -> None:
    from llkd_ray import storage
    from llkd_ray.errors import ArtifactError
    from llkd_ray.journal import last_of_each_stage
    from llkd_ray.lineage import Lineage
    from llkd_ray.standing import leftovers, standings

    lineage = Lineage(experiment)
    print(storage.address(lineage.run))
    print(
        f"{'made by':9} {'artifact':26} {'state':10} {'since (UTC)':16} {'seconds':>8} "
        f"{'rows':>10} {'rejected':>9} {'MB':>8} {'USD':>9}"
    )
    seconds = cost_usd = 0.0
    for one in standings(lineage):
        made = one.manifest
        rows = (made.rows.kept, made.rows.rejected) if made else ("", "")
        print(
            f"{one.artifact.job:9} {one.artifact.path.name:26} {one.state:10} "
            f"{made.created[:16].replace('T', ' ') if made else '':16} "
            f"{f'{made.seconds:.0f}' if made else '':>8} {rows[0]:>10} {rows[1]:>9} "
            f"{_megabytes(one.size_bytes):>8} {one.cost_usd or '':>9.6}"
        )
        seconds += made.seconds if made else 0
        cost_usd += one.cost_usd
    # Of the calls that ended: what one did that was killed is in no manifest.
    print(
        f"the calls that made them took {seconds / 3600:.2f} hours and {cost_usd:.4f} USD of the "
        "teacher's answers; calls that were killed are not counted"
    )
    for stage, entry in last_of_each_stage(lineage.run).items():
        print(f"jobs/{stage}.py: {_told(entry)}")
    try:
        others = leftovers(lineage)
    except ArtifactError as error:
        print(error)
        return
    if others:
        size = sum(other.size_bytes for other in others) / 1e6
        print(
            f"{len(others)} folders were made from other settings, {size:.1f} MB; jobs/clean.py "
            "lists and removes them"
        )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f}" if size_bytes else ""


def _told(entry: dict[str, Any]) -> str:
    """Say how a job ended, or that it has not said so."""
    when = f"{entry['time'][:16].replace('T', ' ')} UTC"
    match entry["event"]:
        case "started":
            began = datetime.fromisoformat(entry["time"])
            minutes = (datetime.now(UTC) - began).total_seconds() / 60
            return (
                f"started {when} as process {entry['pid']} on {entry['host']}, {minutes:.0f} "
                "minutes ago, and has not ended: it runs, or was killed"
            )
        case "failed":
            return f"failed {when} after {entry['seconds']:.0f} s: {entry['error']}"
        case ended:
            return f"{ended} {when} after {entry['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(answer(parser_of(str(__doc__)).parse_intermixed_args(), status))
