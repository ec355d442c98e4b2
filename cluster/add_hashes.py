"""Write behind each pin of the lock files the SHA-256 of the file that pip takes for it.

Run it after a version has changed, on x86-64 Linux and with CPython 3.11, for these are the files
it looks for: `python cluster/add_hashes.py`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = ("requirements-cpu.txt", "requirements-dev.txt")
_PIN = re.compile(r"(?P<name>[\w.-]+)==[^\s;]+")


def hashes_of(requirements: Path) -> dict[str, str]:
    """Return the SHA-256 of the file that pip would install for each pin, by normalized name."""
    with tempfile.TemporaryDirectory() as folder:
        report, bare = Path(folder) / "report.json", Path(folder) / "requirements.txt"
        bare.write_text("\n".join(_pins(requirements)), encoding="utf-8")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        install += ["--ignore-installed", "--report", str(report), "--requirement", str(bare)]
        subprocess.run(install, check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        normalized(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
        for item in found
    }


def normalized(name: str) -> str:
    """Return a package's name in the one spelling that indexes use."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(requirements: Path) -> list[str]:
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return [pin[0] for pin in map(_PIN.match, lines) if pin]


def main() -> None:
    """Write both lock files anew."""
    for path in map(Path(__file__).parent.joinpath, FILES):
        hashes = hashes_of(path)
        lines = [
            f"{pin[0]} --hash=sha256:{hashes[normalized(pin['name'])]}" if pin else line
            for line in path.read_text(encoding="utf-8").splitlines()
            for pin in [_PIN.match(line)]
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {len(hashes)} pins with the hash of their file")


if __name__ == "__main__":
    main()
