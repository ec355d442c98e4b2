"""Hashes of what local files hold, remembered while a file's size and time stay as they are."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llkd_ray import embedded
from llkd_ray.artifacts import write_text
from llkd_ray.progress import progress

_PIECE_BYTES = 1 << 20
# Reading so much takes a moment that nobody needs a progress bar for.
_SOON_BYTES = 2_000_000_000


def digests(paths: Sequence[Path], memory: Path) -> list[str]:
    """Return the SHA-256 of each file, in hexadecimal digits; of one that cannot be read, nothing.

    Args:
        paths: The files.
        memory: JSON file of the hashes taken before; it is made, and replaced where files changed.
            Whatever it cannot say is read anew.
    """
    known = _remembered(memory)
    seen = {str(path): _size_and_time(path) for path in paths}
    new = {
        path: size for path, (size, time) in seen.items() if known.get(path, [])[:2] != [size, time]
    }
    with contextlib.ExitStack() as stack:
        bar = None
        if sum(new.values()) > _SOON_BYTES:
            bar = stack.enter_context(progress("hash", "MB", total=sum(new.values()) // 10**6))
        taken: dict[str, list[Any]] = {
            path: [size, time, _sha256(path, bar) if path in new else known[path][2]]
            for path, (size, time) in seen.items()
        }
    read = {path: entry for path, entry in taken.items() if entry[2]}
    if read != known:
        with contextlib.suppress(OSError):  # Then they are taken anew next time.
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, json.dumps(read))
    return [taken[str(path)][2] for path in paths]


def memory_of(what: str, cache: Path) -> Path:
    """Return the file that remembers the hashes of a source or of a folder."""
    return cache / f"digests/{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def revision(model: str, cache: Path) -> str:
    """Name the exact weights behind a model setting, for fingerprints.

    A folder is named by all that its files hold: weights that were trained further, in the same
    place or in another, are another model's. Anything else, as `embedded.revision` names it.

    Args:
        model: An embedded model, a folder, or a model of the hub.
        cache: Folder that remembers hashes.
    """
    folder = Path(model).expanduser()
    name = embedded.revision(model)
    if name != model or not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.is_file())
    hashes = digests(files, memory_of(str(folder.resolve()), cache))
    held = "".join(f"{file.name} {of}\n" for file, of in zip(files, hashes, strict=True))
    return f"folder:{hashlib.sha256(held.encode()).hexdigest()[:16]}"


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _sha256(path: str, bar: Any | None) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                if bar is not None:
                    bar.update(len(piece) / 10**6)
    except OSError:
        return ""  # Whoever reads the file says so, or goes on without it.
    return digest.hexdigest()
