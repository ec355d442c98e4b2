"""Read a corpus from wherever it lies, row by row: built in, Parquet, CSV or JSON lines.

A row that cannot be read as such is handed on as `Unreadable`, so that the caller can keep it
aside; a file that cannot be read at all is a `CorpusError`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from llkd_ray import embedded
from llkd_ray.config import CorpusSection
from llkd_ray.errors import CorpusError

_FORMATS = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class Unreadable:
    """What stands in place of a text that is none."""

    reason: str
    content: str


@dataclass(frozen=True)
class SourceRow:
    """A row as it was found."""

    where: str
    """File name and row number, from 0."""
    text: object
    gold: object


@dataclass(frozen=True)
class _File:
    filesystem: pyarrow.fs.FileSystem
    path: str
    size_bytes: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def identity(config: CorpusSection) -> list[str]:
    """Name the exact content of the source: package and version, or size and time of each file.

    Raises:
        CorpusError: There is nothing at `config.source`.
    """
    if config.source in embedded.CORPORA:
        return [embedded.revision(config.source)]
    return [f"{file.path} {file.size_bytes} {file.mtime_ns}" for file in _files(config.source)]


def size_bytes(config: CorpusSection) -> int:
    """Return the size of the source on disk in bytes."""
    if config.source in embedded.CORPORA:
        return embedded.locate(embedded.CORPORA[config.source]).stat().st_size
    return sum(file.size_bytes for file in _files(config.source))


def read(config: CorpusSection) -> Iterator[SourceRow]:
    """Yield every row of the source, in order, in bounded memory.

    Raises:
        CorpusError: A file cannot be read or lacks a column; the sentence names the columns
            there are.
    """
    if config.source == "trec":
        yield from _read_trec(embedded.locate(embedded.CORPORA["trec"]))
        return
    for file in _files(config.source):
        if file.size_bytes == 0:
            raise CorpusError(f"{file.path}: the file is empty")
        suffix = Path(file.path).suffix
        reader = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}[suffix]
        try:
            yield from reader(file, config.text_column, config.gold_column)
        except pa.ArrowInvalid as error:
            first_line = str(error).splitlines()[0]
            raise CorpusError(
                f"{file.path}: not a readable {suffix[1:]} file: {first_line}"
            ) from None


def _files(source: str) -> list[_File]:
    try:
        if "://" in source:
            filesystem, path = pyarrow.fs.FileSystem.from_uri(source)
        else:
            filesystem, path = pyarrow.fs.LocalFileSystem(), str(Path(source).expanduser())
        info = filesystem.get_file_info(path)
        if info.type == pyarrow.fs.FileType.Directory:
            selector = pyarrow.fs.FileSelector(path, recursive=True)
            infos = [found for found in filesystem.get_file_info(selector) if found.is_file]
        else:
            infos = [info]
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"corpus.source = {source!r}: {str(error).splitlines()[0]}") from None
    if info.type == pyarrow.fs.FileType.NotFound:
        built_in = ", ".join(embedded.CORPORA)
        raise CorpusError(
            f"corpus.source = {source!r}: no such file or folder, nor built in ({built_in})"
        )
    files = [
        _File(filesystem, found.path, found.size, found.mtime_ns or 0)
        for found in sorted(infos, key=lambda found: found.path)
        if Path(found.path).suffix in _FORMATS
    ]
    if not files:
        raise CorpusError(
            f"corpus.source = {source!r}: no file that ends in {', '.join(_FORMATS)} there"
        )
    return files


def _read_trec(path: Path) -> Iterator[SourceRow]:
    """Read lines `COARSE:fine question`, the coarse class as gold."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            classes, _, question = line.partition(" ")
            yield SourceRow(
                f"{path.name}:{number}", " ".join(question.split()), classes.partition(":")[0]
            )


def _read_parquet(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    with file.filesystem.open_input_file(file.path) as stream:
        parquet = pq.ParquetFile(stream)
        _demand_columns(file, parquet.schema_arrow.names, text, gold)
        kind = parquet.schema_arrow.field(text).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise CorpusError(
                f"{file.path}: column {text!r} holds {kind}, not text; set corpus.text_column"
            )
        number = 0
        for batch in parquet.iter_batches(4096, columns=[text] + ([gold] if gold else [])):
            golds = batch.column(gold).to_pylist() if gold else [None] * batch.num_rows
            for value, human in zip(_strings(batch.column(text)), golds, strict=True):
                yield SourceRow(f"{file.name}:{number}", value, human)
                number += 1


def _strings(column: pa.Array) -> list[object]:
    """Convert to Python strings; where a value is not UTF-8, convert one by one."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
        values = [_decode(value) for value in raw.to_pylist()]
    return values


def _decode(value: bytes | None) -> object:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return Unreadable("the text is not UTF-8", repr(value[:100]))


def _read_csv(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    broken: list[SourceRow] = []

    def keep_aside(row: Any) -> str:
        reason = f"the line has {row.actual_columns} columns, not {row.expected_columns}"
        broken.append(SourceRow(f"{file.name}:{row.number}", Unreadable(reason, row.text), None))
        return "skip"

    with file.filesystem.open_input_stream(file.path) as stream:
        wanted = [text] + ([gold] if gold else [])
        reader = pyarrow.csv.open_csv(
            stream,
            # One thread, so that pyarrow knows the number of a broken line.
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(
                newlines_in_values=True, invalid_row_handler=keep_aside
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
            ),
        )
        _demand_columns(file, reader.schema.names, text, gold)
        number = 0
        for batch in reader:
            golds = batch.column(gold).to_pylist() if gold else [None] * batch.num_rows
            for value, human in zip(_strings(batch.column(text)), golds, strict=True):
                yield SourceRow(f"{file.name}:{number}", value, human)
                number += 1
        yield from broken


def _read_jsonl(file: _File, text: str, gold: str | None) -> Iterator[SourceRow]:
    found = False
    with file.filesystem.open_input_stream(file.path) as stream:
        for number, raw in enumerate(_lines(stream)):
            where = f"{file.name}:{number}"
            try:
                row = json.loads(raw)
            except (json.JSONDecodeError, UnicodeDecodeError):
                yield SourceRow(where, Unreadable("the line is not JSON", repr(raw[:100])), None)
                continue
            if not isinstance(row, dict):
                yield SourceRow(where, Unreadable("the line is no object", repr(raw[:100])), None)
                continue
            if not found:
                _demand_columns(file, list(row), text, gold)
                found = True
            yield SourceRow(where, row.get(text), row.get(gold) if gold else None)


def _lines(stream: Any) -> Iterator[bytes]:
    """Cut a byte stream into its lines; blank lines are left out."""
    rest = b""
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
    if rest.strip():
        yield rest


def _demand_columns(file: _File, names: list[str], text: str, gold: str | None) -> None:
    for setting, column in (("text_column", text), ("gold_column", gold)):
        if column is not None and column not in names:
            raise CorpusError(
                f"{file.path}: no column {column!r}; the columns are {', '.join(names)}: "
                f"set corpus.{setting}"
            )
