"""How a run stands: what of an experiment is made, what is being made, what belongs to others."""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llkd_ray import storage
from llkd_ray.artifacts import MANIFEST, Artifact, Manifest, being_made
from llkd_ray.compare.variants import variants_of
from llkd_ray.errors import ArtifactError
from llkd_ray.lineage import Lineage

State = Literal["made", "being made", "unfinished", "not made"]

_FOLDER = re.compile(r"[a-z]+-[0-9a-f]{12}(?P<unfinished>\.making)?(\.removed)?")
# What was written to a store so lately may be written to still.
_AT_WORK_S = 3600


@dataclass(frozen=True)
class Standing:
    """An artifact of the experiment."""

    artifact: Artifact
    state: State
    manifest: Manifest | None
    """Of a made one."""
    size_bytes: int

    @property
    def cost_usd(self) -> float:
        """What the teacher cost for it, as far as its stage counts that."""
        return float(self.manifest.details.get("cost_usd") or 0) if self.manifest else 0.0


@dataclass(frozen=True)
class Leftover:
    """A folder of the run that the experiment does not name."""

    path: Path
    size_bytes: int
    age_s: float
    """Since it was last written to."""

    @property
    def answers(self) -> bool:
        """Whether it holds answers of a teacher, which cost something to get again."""
        return self.path.name.startswith("ledger-")


def standings(lineage: Lineage) -> Iterator[Standing]:
    """Yield the experiment's artifacts in the order of their making.

    Those that only some experiments need are left out until something of them is there.
    """
    main_line = {artifact.path for artifact in lineage.main_line}
    for artifact in lineage.artifacts:
        standing = _standing(artifact)
        if standing.state != "not made" or artifact.path in main_line:
            yield standing


def leftovers(lineage: Lineage) -> list[Leftover]:
    """List what in the run's folder was made from other settings, the oldest first.

    Raises:
        ArtifactError: Such a thing is being made now, of others that it may need.
    """
    named = _named(lineage)
    found = []
    # What a node is making of a run in a store stands in its own mirror alone.
    mirrored = [path.name for path in lineage.run.iterdir()] if lineage.run.is_dir() else []
    for name in {*storage.names(lineage.run), *mirrored}:
        path = lineage.run / name
        match = _FOLDER.fullmatch(name)
        if match is None or path in named or not _is_there(path):
            continue
        leftover = Leftover(path, _size_bytes(path), time.time() - _written(path))
        if match["unfinished"] and (being_made(path.with_suffix("")) or _perhaps(leftover)):
            raise ArtifactError(
                f"{storage.address(path)}: a job with other settings is at work here, and needs "
                "what was made with them; wait for it, or stop it"
            )
        found.append(leftover)
    return sorted(found, key=lambda leftover: -leftover.age_s)


def _perhaps(leftover: Leftover) -> bool:
    """Return whether a job of another node may be at work in a store, where no lock tells."""
    return bool(storage.files(leftover.path)) and leftover.age_s < _AT_WORK_S


def _named(lineage: Lineage) -> set[Path]:
    """Return the folders that an experiment, or a variant that it compares, may make or read."""
    variants = [variant.rows for variant in variants_of(lineage.experiment)]
    artifacts = list(lineage.artifacts)
    for one in variants:
        artifacts += one.artifacts
    ledgers = {one.ledger for one in (lineage, *variants)}
    return ledgers | {path for item in artifacts for path in (item.path, item.making)}


def remove(leftover: Leftover) -> None:
    """Delete a leftover; killed on the way, it is no artifact any more and goes next time."""
    gone = leftover.path
    if storage.in_store(gone):
        storage.remove(gone / MANIFEST)
        storage.remove(gone)
        return
    if gone.suffix != ".removed":
        gone = gone.with_name(f"{gone.name}.removed")
        leftover.path.rename(gone)
    shutil.rmtree(gone)


def _standing(artifact: Artifact) -> Standing:
    if artifact.made:
        return Standing(artifact, "made", artifact.manifest(), _size_bytes(artifact.path))
    if not _is_there(artifact.making):
        return Standing(artifact, "not made", None, 0)
    state: State = "being made" if being_made(artifact.path) else "unfinished"
    return Standing(artifact, state, None, _size_bytes(artifact.making))


def _is_there(folder: Path) -> bool:
    return folder.is_dir() or bool(storage.files(folder))


def _size_bytes(folder: Path) -> int:
    """Add up the files; those that vanish meanwhile do not count."""
    total = sum(file.size_bytes for file in storage.files(folder))
    if total:
        return total
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _written(folder: Path) -> float:
    """Return when a folder was last written to, in seconds since 1970."""
    stored = {file.name: file.written for file in storage.files(folder)}
    if stored:
        return stored.get(MANIFEST) or max(stored.values())
    manifest = folder / MANIFEST
    if manifest.is_file():
        return manifest.stat().st_mtime
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
