"""From Parquet shards to token batches: the rows of one worker.

Every row belongs to one lane and every lane to one worker, by the row's id. (A Ray Data shard would
be split equally and the remainder dropped, and no labelled row may be lost.)

Shape legend: N rows, C classes, T tokens of them all, B rows and L tokens of a batch.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from llkd_ray.corpus import read_shards
from llkd_ray.selection import NONE, Bools, Ints, Keys, Probabilities

_READ_ROWS = 4096


@dataclass(frozen=True)
class Tokens:
    """Token ids of N texts, without padding."""

    ids: npt.NDArray[np.int32]
    """[T], of all texts, one after the other."""
    starts: Ints
    """[N], where each text's ids begin."""
    lengths: Ints
    """[N], how many they are."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, text: int) -> npt.NDArray[np.int32]:
        start = self.starts[text]
        return self.ids[start : start + self.lengths[text]]

    def subset(self, chosen: Bools) -> "Tokens":
        """Return some of the texts, of the same ids."""
        return Tokens(self.ids, self.starts[chosen], self.lengths[chosen])


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of one worker."""

    keys: Keys
    """[N], the upper half of each row id."""
    lower: Keys
    """[N], the lower half; its remainder is the row's lane."""
    label: Ints
    """[N], position of the teacher's label in task.labels, or NONE."""
    gold: Ints
    """[N], likewise of the human's. Read for purity, validation and the rule `gold`."""
    teacher: Probabilities
    """[N, C], the teacher's calibrated distribution; NaN without one."""
    tokens: Tokens
    """Of the N texts, on disk: the pages not in use cost no memory."""

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, chosen: Bools) -> "Rows":
        """Return some of the rows."""
        parts = {
            field.name: getattr(self, field.name)[chosen]
            for field in fields(self)
            if field.name != "tokens"
        }
        return Rows(**parts, tokens=self.tokens.subset(chosen))


@dataclass(frozen=True)
class Share:
    """Which rows are this worker's: those whose lane falls to `rank` of `world_size`."""

    rank: int
    world_size: int
    lanes: int
    """How many lanes there are; the number of workers does not change it."""

    def of(self, lower: Keys) -> Bools:
        """Return which of the rows with these lower halves are this worker's."""
        mine: Bools = lane_of(lower, self.lanes) % self.world_size == self.rank
        return mine


def lane_of(lower: Keys, lanes: int) -> Ints:
    """Return the lane of each row, [N]."""
    return (lower % np.uint64(lanes)).astype(np.int64)


def read_rows(
    folder: Path,
    tokenizer: Any,
    max_length: int,
    label_names: Sequence[str],
    *,
    share: Share,
    gold_only: bool = False,
) -> Rows:
    """Read and tokenize one worker's rows of a split.

    Reads:
        row_id, text, gold, and where they are there label, probabilities.

    Args:
        folder: With shard-*.parquet.
        tokenizer: Of the student.
        max_length: Tokens after which a text is cut.
        label_names: The order of the classes.
        share: Which rows are this worker's.
        gold_only: Leave out rows without gold.
    """
    names = pa.array(label_names)
    keys = [np.empty((0, 2), dtype=np.uint64)]
    label, gold = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    teacher = [np.empty((0, len(label_names)), dtype=np.float32)]
    lengths = [np.empty(0, dtype=np.int64)]
    with tempfile.TemporaryFile(prefix="llkd_ray-tokens-") as file:
        for batch in _read_batches(folder):
            ids = split_ids(batch.column("row_id").to_pylist())
            mine = share.of(ids[:, 1])
            if gold_only:
                mine &= batch.column("gold").is_valid().to_numpy(zero_copy_only=False)
            if not mine.any():
                continue
            chosen = batch.filter(pa.array(mine))
            keys.append(ids[mine])
            gold.append(_positions(chosen, "gold", names))
            label.append(_positions(chosen, "label", names))
            teacher.append(_distributions(chosen, len(label_names)))
            tokens = tokenize(tokenizer, chosen.column("text").to_pylist(), max_length)
            # Not tofile: at a full disk its error does not say so.
            file.write(tokens.ids.data)
            lengths.append(tokens.lengths)
        both = np.concatenate(keys)
        return Rows(
            keys=both[:, 0].copy(),
            lower=both[:, 1].copy(),
            label=np.concatenate(label),
            gold=np.concatenate(gold),
            teacher=np.concatenate(teacher),
            tokens=_packed(_mapped(file), np.concatenate(lengths)),
        )


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Return the token ids of each text, cut, not padded."""
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    ids = np.array([token for text in encoded for token in text], dtype=np.int32)
    return _packed(ids, np.array(list(map(len, encoded)), dtype=np.int64))


def split_ids(row_ids: Sequence[str]) -> Keys:
    """Return the two halves of row ids of 32 hexadecimal digits as numbers, [N, 2]."""
    halves = np.frombuffer(bytes.fromhex("".join(row_ids)), dtype=">u8")
    return halves.astype(np.uint64).reshape(-1, 2)


def pad(
    tokens: Tokens, chosen: Ints, pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the chosen texts as model input, [B, L], padded to the longest of them.

    No texts give one of padding alone: a worker that has run out still takes part in a step.
    """
    lengths = tokens.lengths[chosen] if len(chosen) else np.array([1])
    input_ids = np.full((len(lengths), lengths.max()), pad_token_id, dtype=np.int64)
    for line, text in enumerate(chosen):
        input_ids[line, : lengths[line]] = tokens[text]
    attention_mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(input_ids).to(device),
        "attention_mask": torch.from_numpy(attention_mask).to(device),
    }


def by_length(lengths: Ints, batch_size: int, num_batches: int) -> Iterator[Ints]:
    """Yield row positions, longest texts first, and empty batches up to `num_batches`."""
    order = np.argsort(-lengths, kind="stable")
    for batch in range(num_batches):
        yield order[batch * batch_size : (batch + 1) * batch_size]


def _read_batches(folder: Path) -> Iterator[pa.RecordBatch]:
    wanted = ("row_id", "text", "gold", "label", "probabilities")
    for path in read_shards(folder):
        with pq.ParquetFile(path) as file:
            columns = [name for name in wanted if name in file.schema_arrow.names]
            yield from file.iter_batches(batch_size=_READ_ROWS, columns=columns)


def _positions(batch: pa.RecordBatch, column: str, names: pa.Array) -> Ints:
    if column not in batch.schema.names:
        return np.full(len(batch), NONE, dtype=np.int64)
    found = pc.index_in(batch.column(column), value_set=names).fill_null(NONE)
    positions: Ints = found.to_numpy(zero_copy_only=False).astype(np.int64)
    return positions


def _distributions(batch: pa.RecordBatch, num_classes: int) -> Probabilities:
    if "probabilities" not in batch.schema.names:
        return np.full((len(batch), num_classes), np.nan, dtype=np.float32)
    flat = batch.column("probabilities").flatten().to_numpy(zero_copy_only=False)
    distributions: Probabilities = flat.astype(np.float32).reshape(-1, num_classes)
    return distributions


def _packed(ids: npt.NDArray[np.int32], lengths: Ints) -> Tokens:
    """Return texts whose ids lie one after the other."""
    return Tokens(ids, np.cumsum(lengths) - lengths, lengths)


def _mapped(file: BinaryIO) -> npt.NDArray[np.int32]:
    """Map a file of token ids; it has no name and goes with the last reader."""
    file.flush()
    if not file.tell():
        return np.empty(0, dtype=np.int32)
    return np.memmap(file, dtype=np.int32, mode="r")
