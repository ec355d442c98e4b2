"""Every answer a teacher ever gave, so that no row is asked about twice.

A ledger belongs to one way of asking: prompt, teacher and its revision, labels, decoding. It knows
nothing of corpora, so one that has grown finds the answers about its old rows. It is a folder of
sorted Parquet files, each named by its first and last row_id; a reader opens those that overlap
the rows it has in hand. While rows are being answered, each batch is at once written as a part
into a folder named the same way; `compact` makes such a folder one file.

Nothing is ever changed in place: a part is written beside and renamed, and what a crash leaves
twice is the same answer twice. In an object store each part is put there before anything else is
told, and what is in the store is the ledger; its mirror on a node only saves reading a part twice.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray import schema, storage
from llkd_ray.artifacts import write_text
from llkd_ray.errors import ArtifactError, TeacherError

# Leading digits of a row_id in a file name: enough to tell ranges apart.
_DIGITS = 16
_IDENTITY = "identity.json"
_WAY = "way.txt"


@dataclass(frozen=True)
class Ledger:
    """The answers of one way of asking."""

    folder: Path
    num_classes: int

    @property
    def columns(self) -> pa.Schema:
        """Columns of an entry: schema.readouts, and which attempt it was, from 1."""
        return schema.readouts(self.num_classes).append(
            pa.field("attempt", pa.int32(), nullable=False)
        )

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make the folder if need be, and write down what its answers depend on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not storage.exists(self.folder / _IDENTITY):
            write_text(self.folder / _IDENTITY, json.dumps(identity, indent=2) + "\n")
            storage.put(self.folder / _IDENTITY)

    def agree(self, way: str) -> None:
        """Hold all answers to one way of reading labels, that of the first.

        Raises:
            TeacherError: The answers so far are read in another way.
        """
        path = self.folder / _WAY
        if not storage.exists(path):
            write_text(path, way)
            storage.put(path)
        first = storage.read(path).decode()
        if first != way:
            raise TeacherError(
                f"the endpoint gives {way} now, and its answers so far are {first}, which cannot "
                "stand side by side: have it answer as before, or set teacher.readout or "
                "teacher.top_logprobs, with which all rows are asked about anew"
            )

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the ledger's lock; the kernel lets go of it however the process ends.

        In an object store, it keeps off the jobs of this node; those of others would ask about the
        same rows.

        Raises:
            ArtifactError: Another job is writing into it.
        """
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArtifactError(
                    f"{self.folder}: another job is labelling with the same teacher and prompt; "
                    "wait for it, or stop it"
                ) from None
            yield

    def write(self, parts: str, entries: pa.Table) -> None:
        """Write a batch of entries as a part.

        A part is named by its rows, so that a batch which Ray runs again is found, or replaces
        itself.

        Args:
            parts: Name of the folder of parts, from `range_name`.
            entries: Rows with the ledger's columns.
        """
        folder = self.folder / parts
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder, entries.select(self.columns.names).cast(self.columns))

    def written(self, parts: str, rows: pa.Table) -> pa.Table | None:
        """Return the part that `write` made of the same rows, if it did.

        Args:
            parts: Name of the folder of parts, from `range_name`.
            rows: Columns `row_id` and `attempt` at least.
        """
        path = self.folder / parts / _file_name(_sorted(rows))
        if not storage.exists(path):
            return None
        storage.fetch([path])
        return pq.read_table(path, schema=self.columns)

    def find(self, row_ids: pa.Array, *, parts: bool = True) -> pa.Table:
        """Return one entry for each of the rows that has any, in the order of `row_ids`.

        An answer comes before a failure, and among failures the last attempt. Memory is bounded by
        the rows asked for and one file of the ledger, whatever the ledger holds.

        Args:
            row_ids: Sorted, distinct ids [N].
            parts: Look into parts, too, and not into what is compacted alone.
        """
        if len(row_ids) == 0:
            return self.columns.empty_table()
        first, last = row_ids[0].as_py(), row_ids[-1].as_py()
        while True:
            paths = self._overlapping(first, last, parts=parts)
            try:
                return self._best(row_ids, paths)
            except FileNotFoundError:
                # A part may have gone into a compacted file after it was listed, which then is
                # there now. Where the list is the same, something else is wrong.
                if self._overlapping(first, last, parts=parts) == paths:
                    raise

    def _best(self, row_ids: pa.Array, paths: list[Path]) -> pa.Table:
        found = []
        storage.fetch(paths)
        for path in paths:
            ids = pq.read_table(path, columns=["row_id"]).column("row_id")
            wanted = pc.is_in(ids, value_set=row_ids)
            if pc.any(wanted).as_py():
                found.append(pq.read_table(path, schema=self.columns).filter(wanted))
        entries = pa.concat_tables(found) if found else self.columns.empty_table()
        failed = pc.is_valid(entries.column("error")).cast(pa.int8())
        entries = entries.append_column("failed", failed).sort_by(
            [("failed", "ascending"), ("attempt", "descending")]
        )
        # index_in returns the first match: the best entry of each row, by the order above.
        where = pc.index_in(row_ids, value_set=entries.column("row_id"))
        return entries.take(where.drop_null()).drop_columns("failed")

    def open_folders(self) -> list[str]:
        """Name the folders that still hold parts."""
        return sorted(path.name for path in _folders(self.folder))

    def compact(self, parts: str) -> None:
        """Make a folder of parts one sorted file."""
        folder = self.folder / parts
        files = _files(folder)
        storage.fetch(files)
        tables = [pq.read_table(part, schema=self.columns) for part in files]
        if tables:
            self._write(self.folder, pa.concat_tables(tables))
        # In a store, another node's job may have written a part meanwhile.
        if _files(folder) == files:
            storage.remove(folder)

    def _write(self, folder: Path, entries: pa.Table) -> None:
        entries = _sorted(entries)
        path = folder / _file_name(entries)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(entries, beside)
        os.replace(beside, path)
        storage.put(path)

    def _overlapping(self, first: str, last: str, *, parts: bool) -> list[Path]:
        """List the files with ids between two ids.

        Parts come before whole files: what is compacted in between is then seen twice, not never.
        """
        of_folders = [
            part
            for path in (_folders(self.folder) if parts else ())
            if _overlaps(path.name, first, last)
            for part in _files(path)
        ]
        return [
            path
            for path in (*of_folders, *_files(self.folder))
            if _overlaps(path.name, first, last)
        ]


def range_name(first: str, last: str) -> str:
    """Name a range of row ids: of a file, or of the folder with a corpus shard's parts."""
    return f"{first[:_DIGITS]}-{last[:_DIGITS]}"


def _sorted(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("row_id", "ascending"), ("attempt", "ascending")])


def _file_name(rows: pa.Table) -> str:
    """Name a file by its rows, which are sorted, and by which attempts they are."""
    ids = rows.column("row_id").to_pylist()
    attempts = rows.column("attempt").to_pylist()
    digest = hashlib.sha256(("".join(ids) + str(attempts)).encode()).hexdigest()[:8]
    return f"{range_name(ids[0], ids[-1])}-{digest}.parquet"


def _folders(ledger: Path) -> list[Path]:
    """List the folders of parts: what has no ending."""
    return [ledger / name for name in storage.names(ledger) if "." not in name]


def _files(folder: Path) -> list[Path]:
    """List the files with entries; a folder that is compacted right now is a file already."""
    names = sorted(storage.names(folder))
    return [folder / name for name in names if name.endswith(".parquet") and name[0] != "."]


def _overlaps(name: str, first: str, last: str) -> bool:
    begins, ends, *_ = name.removesuffix(".parquet").split("-")
    return begins <= last[:_DIGITS] and ends >= first[:_DIGITS]
