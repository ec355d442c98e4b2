"""List what a run holds that was made from other settings; with --delete, remove it.

What the experiment, with the overrides given, names is kept, and so are the answers of teachers
unless --answers is given: they were paid for. Serve nothing from the run that is not of this
experiment meanwhile.
"""

import sys

from llkd_ray.cli import answer, parser_of
from llkd_ray.config import Experiment

_DAY_S = 86_400


def main() -> int:
    parser = parser_of(str(__doc__))
    parser.add_argument("--delete", action="store_true", help="remove what is listed")
    parser.add_argument("--answers", action="store_true", help="ledgers of other settings, too")
    parser.add_argument(
        *("--older-than-days", "--days"), type=float, default=0.0, help="spare what is younger"
    )
    arguments = parser.parse_intermixed_args()

    def clean(experiment: Experiment) -> None:
        from llkd_ray import storage
        from llkd_ray.lineage import Lineage
        from llkd_ray.standing import leftovers, remove

        lineage = Lineage(experiment)
        removed_bytes = count = 0
        for leftover in leftovers(lineage):
            if leftover.age_s < arguments.older_than_days * _DAY_S:
                continue
            if leftover.answers and not arguments.answers:
                print(f"kept: {storage.address(leftover.path)}, a teacher's answers (--answers)")
                continue
            print(
                f"{storage.address(leftover.path)}: {leftover.size_bytes / 1e6:.1f} MB, "
                f"{leftover.age_s / _DAY_S:.1f} days old"
            )
            if arguments.delete:
                remove(leftover)
            count += 1
            removed_bytes += leftover.size_bytes
        done = "removed" if arguments.delete else "to remove with --delete"
        print(f"clean: {count} folders {done}, {removed_bytes / 1e6:.1f} MB")

    return answer(arguments, clean)


if __name__ == "__main__":
    sys.exit(main())
