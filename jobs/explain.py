"""Tell one row's story: what teacher and student thought of it in each epoch, kept or not."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, e.g. runs/NAME")
    parser.add_argument("row_id", metavar="ROW_ID", help="of the row, or its first digits")
    arguments = parser.parse_args()

    from llkd_ray.errors import ArtifactError, LLKDError
    from llkd_ray.report.story import as_text, tell

    try:
        if "://" in arguments.run:
            raise ArtifactError(
                f"{arguments.run}: a row's story is read in a folder: name that of this node's "
                "mirror, below stores/ in the experiment's cache, where the run was trained"
            )
        stories = tell(Path(arguments.run), arguments.row_id)
    except LLKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(map(as_text, stories)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
