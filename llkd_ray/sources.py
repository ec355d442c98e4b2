"""Read a corpus from wherever it lies, row by row: built in, Parquet, CSV or JSON lines.

A row that cannot be read as such is handed on as `Unreadable`, so that the caller can keep it
aside. So is a whole file, where `corpus.skip_unreadable_files` says to go on without it; else it is
a `CorpusError`. Bytes that are not UTF-8 become lone surrogates, which no valid text holds.
"""

import csv
import functools
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, AnyStr

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from llkd_ray import embedded
from llkd_ray.config import CorpusSection
from llkd_ray.digests import digests, memory_of
from llkd_ray.errors import CorpusError

_log = logging.getLogger(__name__)

_FORMATS = (".parquet", ".csv", ".jsonl")

# Rows of Parquet that are held at once: so many, and not much more than so many bytes.
_BATCH_ROWS = 4096
_BATCH_BYTES = 64_000_000

# A line or field beyond this is a file gone wrong, a quote left open for instance; it bounds what
# is held of a file that has no line ends at all.
_MAX_LINE = 256_000_000
# Objects of a JSONL file that may come before the first one with gold.
_OBJECTS_WITHOUT_GOLD = 100_000


@dataclass(frozen=True)
class Unreadable:
    """What stands in place of a text that is none."""

    reason: str
    content: str


@dataclass(frozen=True)
class SourceRow:
    """A row as it was found."""

    where: str
    """File name and row number, from 0; the path of a file that cannot be read."""
    text: object
    gold: object


@dataclass(frozen=True)
class _File:
    filesystem: pyarrow.fs.FileSystem
    path: str
    size_bytes: int | None
    """None of a link to nothing."""
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def identity(config: CorpusSection, cache: Path, examples_source: str | None = None) -> list[str]:
    """Name the exact content of a source.

    What is built in goes by package and version; a local file by its name and a hash of its
    content, so that a copy, or the folder mounted anew, is the same source; a file in an object
    store by path, size and time, which there change with the object alone.

    Args:
        config: Names the source.
        cache: Folder that remembers hashes.
        examples_source: `task.examples_source`, to be read in the place of `config.source`.

    Raises:
        CorpusError: There is nothing at the source.
    """
    source = config.source if examples_source is None else examples_source
    if source in embedded.CORPORA:
        return [embedded.revision(source)]
    files = _files(config, examples_source)
    if not isinstance(files[0].filesystem, pyarrow.fs.LocalFileSystem):
        return [f"{file.path} {file.size_bytes} {file.mtime_ns}" for file in files]
    hashes = digests([Path(file.path) for file in files], memory_of(source, cache))
    return [f"{file.name} sha256:{hash_}" for file, hash_ in zip(files, hashes, strict=True)]


def size_bytes(config: CorpusSection) -> int:
    """Return the size of the source on disk in bytes."""
    if config.source in embedded.CORPORA:
        return embedded.locate(embedded.CORPORA[config.source]).stat().st_size
    return sum(file.size_bytes or 0 for file in _files(config))


def read(config: CorpusSection, examples_source: str | None = None) -> Iterator[SourceRow]:
    """Yield every row of a source, in order, in bounded memory.

    A file that cannot be read, or not to its end, stands for one row more, an `Unreadable`, where
    `skip_unreadable_files` is set; the rows before its break are yielded.

    Args:
        config: Names the source and its columns.
        examples_source: `task.examples_source`, to be read in the place of `config.source`.

    Raises:
        CorpusError: A file cannot be read or lacks a column, or no file can be read; the sentence
            names the file and the columns there are.
    """
    if (examples_source or config.source) == "trec":
        yield from _read_trec(embedded.locate(embedded.CORPORA["trec"]))
        return
    files = _files(config, examples_source)
    failed: list[str] = []
    any_readable = False
    for file in files:
        try:
            for row in _read_file(file, config.text_column, config.gold_column):
                any_readable = True
                yield row
            any_readable = True
        except CorpusError as error:
            if not config.skip_unreadable_files:
                advice = "; corpus.skip_unreadable_files=true goes on without it"
                raise CorpusError(f"{error}{advice if len(files) > 1 else ''}") from None
            _log.warning("left out: %s", error)
            failed.append(str(error))
            yield SourceRow(file.path, Unreadable("the file cannot be read", str(error)), None)
    if not any_readable:
        raise CorpusError(
            failed[0] if len(files) == 1 else f"none of {len(files)} files can be read: {failed[0]}"
        )


def _files(config: CorpusSection, examples_source: str | None = None) -> list[_File]:
    """List the files of a source by path."""
    if examples_source is None:
        setting, source = "corpus.source", config.source
    else:
        setting, source = "task.examples_source", examples_source
    try:
        if "://" in source:
            filesystem, path = pyarrow.fs.FileSystem.from_uri(_with_an_end(source))
        else:
            filesystem, path = pyarrow.fs.LocalFileSystem(), str(Path(source).expanduser())
        info = filesystem.get_file_info(path)
        if info.type == pyarrow.fs.FileType.Directory:
            selector = pyarrow.fs.FileSelector(path, recursive=True)
            infos = [found for found in filesystem.get_file_info(selector) if found.is_file]
            infos += _links_to_nothing(filesystem, path)
        else:
            infos = [info]
    except Exception as error:  # noqa: BLE001 - file systems of others raise what they like
        reason = str(error).strip() or type(error).__name__
        raise CorpusError(f"{setting} = {source!r}: {reason.splitlines()[0]}") from None
    if info.type == pyarrow.fs.FileType.NotFound:
        built_in = ", ".join(embedded.CORPORA)
        raise CorpusError(
            f"{setting} = {source!r}: no such file or folder, nor built in ({built_in})"
        )
    infos.sort(key=lambda found: found.path)
    files = [
        _File(filesystem, found.path, found.size if found.is_file else None, found.mtime_ns or 0)
        for found in infos
        if _suffix(found.path) in _FORMATS and (found is info or not _is_hidden(found.path, path))
    ]
    taken = {file.path for file in files}
    # Nobody asks about a hidden file, unless it could have been read.
    others = [
        found.base_name
        for found in infos
        if found.path not in taken
        and (_suffix(found.path) in _FORMATS or not _is_hidden(found.path, path))
    ]
    if files and others:
        _tell_left_out(setting, source, len(others), others[0])
    if not files:
        raise CorpusError(
            f"{setting} = {source!r}: no file that ends in {', '.join(_FORMATS)} there"
        )
    return files


@functools.cache  # Once a job, though files are listed for the fingerprint and to be read.
def _tell_left_out(setting: str, source: str, files: int, first: str) -> None:
    ends = ", ".join(_FORMATS)
    _log.warning(
        "%s = %r: left out %d files that are hidden or do not end in %s: %s%s",
        *(setting, source, files, ends, first, " and others" if files > 1 else ""),
    )


def _links_to_nothing(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[pyarrow.fs.FileInfo]:
    """List the links of a local folder that Arrow passes over, to be told when they are read."""
    if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return []
    links = [str(path) for path in Path(folder).rglob("*") if not path.exists()]
    found: list[pyarrow.fs.FileInfo] = filesystem.get_file_info(links) if links else []
    return found


def _is_hidden(path: str, folder: str) -> bool:
    """Return whether a file, or a folder on the way to it, is one that tools hide their own in."""
    return any(part.startswith((".", "_")) for part in path[len(folder) :].split("/"))


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _with_an_end(uri: str) -> str:
    """Have Google's store give up after a minute, where it would try for a quarter of an hour."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds=60"


def _read_trec(path: Path) -> Iterator[SourceRow]:
    """Read lines `COARSE:fine question`, the coarse class as gold."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            classes, _, question = line.partition(" ")
            yield SourceRow(
                f"{path.name}:{number}", " ".join(question.split()), classes.partition(":")[0]
            )


def _read_file(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    """Yield the rows of a file; whatever is wrong with it as a whole is a CorpusError."""
    if file.size_bytes is None:
        raise CorpusError(f"{file.path}: a link to a file that is not there")
    if file.size_bytes == 0:
        raise CorpusError(f"{file.path}: the file is empty")
    suffix = _suffix(file.path)
    reader = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}[suffix]
    try:
        yield from reader(file, text, gold)
    # Arrow raises OSError as well where a page or a footer is damaged.
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise CorpusError(f"{file.path}: not a readable {suffix[1:]} file: {first_line}") from None


def _read_parquet(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    with file.filesystem.open_input_file(file.path) as stream:
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        columns = parquet.schema_arrow
        _demand_columns(file, columns.names, text, gold)
        kind = columns.field(text).type
        if not _holds_text(kind):
            others = ", ".join(field.name for field in columns if _holds_text(field.type))
            raise CorpusError(
                f"{file.path}: column {text!r} holds {kind}, not text; set corpus.text_column to "
                f"a column that holds text: {others or 'there is none here'}"
            )
        number = 0
        # One thread, so that a file that is damaged in two places always breaks at the first.
        wanted = [text] + ([gold] if gold else [])
        rows = _batch_rows(parquet.metadata)
        for batch in parquet.iter_batches(rows, columns=wanted, use_threads=False):
            golds = _values(batch.column(gold)) if gold else [None] * batch.num_rows
            for value, human in zip(_values(batch.column(text)), golds, strict=True):
                yield SourceRow(f"{file.name}:{number}", value, human)
                number += 1


def _batch_rows(metadata: pq.FileMetaData) -> int:
    groups = range(metadata.num_row_groups)
    uncompressed = sum(metadata.row_group(group).total_byte_size for group in groups)
    rows_within: int = _BATCH_BYTES * metadata.num_rows // max(uncompressed, 1)
    return max(1, min(_BATCH_ROWS, rows_within))


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _values(column: pa.Array) -> list[object]:
    """Convert to Python values, bytes that are not UTF-8 to lone surrogates."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        raw = column.cast(pa.large_binary()).to_pylist()
        values = [
            None if value is None else value.decode(errors="surrogateescape") for value in raw
        ]
    return values


def _read_csv(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    # pyarrow's reader gives up a file for one long row, or for one broken line that is not UTF-8.
    csv.field_size_limit(_MAX_LINE)
    with (
        file.filesystem.open_input_stream(file.path) as stream,
        io.TextIOWrapper(
            io.BufferedReader(stream, 1 << 20),
            encoding="utf-8-sig",
            errors="surrogateescape",
            newline="",
        ) as lines,
    ):
        rows = _rows_of(file, lines)
        header = next(rows, None)
        if header is None:
            raise CorpusError(f"{file.path}: the file has blank lines only")
        _demand_columns(file, header, text, gold)
        text_at, gold_at = header.index(text), header.index(gold) if gold else None
        for number, row in enumerate(rows):
            where = f"{file.name}:{number}"
            if len(row) != len(header):
                reason = f"the line has {len(row)} columns, not {len(header)}"
                yield SourceRow(where, Unreadable(reason, ",".join(row)), None)
            else:
                yield SourceRow(where, row[text_at], None if gold_at is None else row[gold_at])


def _rows_of(file: _File, lines: IO[str]) -> Iterator[list[str]]:
    """Yield the rows of a CSV file but for blank ones.

    Raises:
        CorpusError: A quote is not closed where its row should end: rows behind it would be lost in
            its text.
    """
    newest = ""

    def each() -> Iterator[str]:
        nonlocal newest
        for line in _lines(lines):
            newest = line
            yield line

    reader = csv.reader(each(), strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "larger than" in str(error):
                raise
            if reader.line_num > begins or "end of data" in str(error):
                raise CorpusError(
                    f"{file.path}: a quote is opened in line {begins} and not closed where its row "
                    "ends, so that rows behind it would be part of its text; close it, or double "
                    "it where it is a sign"
                ) from None
            [row] = csv.reader([newest])  # Signs behind a closed quote are taken as they stand.
        if row:
            yield row


def _read_jsonl(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    objects, without_gold = 0, True
    names: list[str] = []
    with (
        file.filesystem.open_input_stream(file.path) as stream,
        io.BufferedReader(stream, 1 << 20) as lines,
    ):
        for number, raw in enumerate(line for line in _lines(lines) if line.strip()):
            where = f"{file.name}:{number}"
            try:
                row = json.loads(raw)
            # Not only JSONDecodeError: a number of 5,000 digits, brackets in brackets.
            except (ValueError, RecursionError):
                yield SourceRow(where, Unreadable("the line is not JSON", repr(raw[:100])), None)
                continue
            if not isinstance(row, dict):
                yield SourceRow(where, Unreadable("the line is no object", repr(raw[:100])), None)
                continue
            if not objects:
                names = list(row)
                _demand_columns(file, names, text, None)
            objects += 1
            without_gold = without_gold and gold not in row
            if objects == _OBJECTS_WITHOUT_GOLD and without_gold:
                _demand_columns(file, names, text, gold)
            yield SourceRow(where, row.get(text), row.get(gold) if gold else None)
    if objects and without_gold:
        _demand_columns(file, names, text, gold)


def _lines(stream: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a file, in memory that is bounded even where it has no line ends."""
    while line := stream.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise OSError(f"a line is longer than {_MAX_LINE} characters")
        yield line


def _demand_columns(file: _File, names: list[str], text: str, gold: str | None) -> None:
    for setting, column in (("text_column", text), ("gold_column", gold)):
        if column is not None and names.count(column) != 1:
            problem = "more than one column" if column in names else "no column"
            told = ", ".join(names).encode(errors="backslashreplace").decode()
            remedy = _misread(names) or f"set corpus.{setting}"
            raise CorpusError(
                f"{file.path}: {problem} {column!r}; the columns are {told}: {remedy}"
            )


def _misread(names: list[str]) -> str | None:
    """Say what to do about names that are no columns, but a file read in the wrong way."""
    if any("\0" in name for name in names):
        return "save the file as UTF-8"
    for separator in (";", "\t", "|"):
        if len(names) == 1 and separator in names[0]:
            return f"they are separated by {separator!r}; save the file with commas"
    return None
