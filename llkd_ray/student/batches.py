"""From Parquet shards to token batches: the rows of one worker, and the order they are read in.

Every row belongs to one worker, named by the lower half of its id. (A Ray Data shard would be
split equally and the remainder dropped, and no labelled row may be lost.)

Shape legend: N rows, T tokens of them all, B rows and L tokens of a batch.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from llkd_ray.corpus import read_shards
from llkd_ray.selection import Floats, Ints

Keys = npt.NDArray[np.uint64]
NONE = -1
"""Stands for a label or gold that a row does not have."""
_READ_ROWS = 4096
# Steps whose rows are sorted by length: 8 leave a quarter of the padding that shuffling makes.
_WINDOW_STEPS = 8


@dataclass(frozen=True)
class Tokens:
    """Token ids of N texts, without padding."""

    ids: npt.NDArray[np.int32]
    """[T], of all texts, one after the other."""
    starts: Ints
    """[N + 1], where each text's ids begin."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of each text, [N]."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of one worker."""

    keys: Keys
    """[N], the upper half of each row id."""
    label: Ints
    """[N], position of the teacher's label in task.labels, or NONE."""
    gold: Ints
    """[N], likewise of the human's. Read for purity and validation, never trained on."""
    confidence: Floats
    """[N], the teacher's probability of its label; NaN without one."""
    tokens: Tokens
    """Of the N texts."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Share:
    """Which worker's rows to read: those whose id falls to `rank` of `world_size`."""

    rank: int
    world_size: int


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
        row_id, text, gold, and where they are there label, confidence.

    Args:
        folder: With shard-*.parquet.
        tokenizer: Of the student.
        max_length: Tokens after which a text is cut.
        label_names: The order of the classes.
        share: Which rows are this worker's.
        gold_only: Leave out rows without gold.
    """
    position: dict[str | None, int] = {name: index for index, name in enumerate(label_names)}
    position[None] = NONE
    keys: list[Keys] = []
    columns: dict[str, list[Any]] = {"label": [], "gold": [], "confidence": []}
    texts: list[Tokens] = []
    for batch in _read_batches(folder):
        upper, owner = split_ids(batch["row_id"])
        mine = owner % np.uint64(share.world_size) == share.rank
        if gold_only:
            mine &= np.array([gold is not None for gold in batch["gold"]], dtype=np.bool_)
        chosen = np.flatnonzero(mine)
        if not len(chosen):
            continue
        keys.append(upper[chosen])
        for name, missing in (("label", None), ("gold", None), ("confidence", np.nan)):
            values = batch.get(name)
            columns[name] += [values[i] if values else missing for i in chosen]
        texts.append(tokenize(tokenizer, [batch["text"][i] for i in chosen], max_length))
    return Rows(
        keys=np.concatenate([np.empty(0, dtype=np.uint64), *keys]),
        label=np.array([position[name] for name in columns["label"]], dtype=np.int64),
        gold=np.array([position[name] for name in columns["gold"]], dtype=np.int64),
        confidence=np.array(columns["confidence"], dtype=np.float64),
        tokens=_joined(texts),
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
    return Tokens(
        ids=np.array([token for text in encoded for token in text], dtype=np.int32),
        starts=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    )


def split_ids(row_ids: Sequence[str]) -> tuple[Keys, Keys]:
    """Return the two halves of row ids of 32 hexadecimal digits as numbers."""
    upper = np.array([int(row_id[:16], 16) for row_id in row_ids], dtype=np.uint64)
    lower = np.array([int(row_id[16:], 16) for row_id in row_ids], dtype=np.uint64)
    return upper, lower


def pad(
    tokens: Tokens, chosen: Ints, pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the chosen texts as model input, [B, L], padded to the longest of them.

    No texts give one of padding alone: a worker that has run out still takes part in a step.
    """
    lengths = tokens.lengths[chosen] if len(chosen) else np.array([1])
    input_ids = np.full((len(lengths), lengths.max()), pad_token_id, dtype=np.int64)
    for line, text in enumerate(chosen):
        input_ids[line, : lengths[line]] = tokens.ids[tokens.starts[text] : tokens.starts[text + 1]]
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


def plan_epoch(rows: Rows, kept: Ints, num_steps: int, *, seed: int, epoch: int) -> list[Ints]:
    """Shuffle the kept rows and deal them out over the steps of an epoch.

    The order follows from row ids, seed and epoch alone. Each worker spreads its own kept rows
    evenly, so that all workers take the same number of steps with nearly the same batches; one
    with fewer rows than steps gets empty batches. Within a few shuffled steps rows of like length
    share a step, on all workers at once, so that little is padded and nobody waits.

    Args:
        rows: Of this worker.
        kept: Positions of the kept ones.
        num_steps: Of the epoch, the same on every worker.
        seed: Of the experiment.
        epoch: From 1.

    Returns:
        Positions of the rows of each step.
    """
    salt = np.random.SeedSequence([seed, epoch])
    shuffled = kept[np.argsort(_mix(rows.keys[kept], salt), kind="stable")]
    same_on_all_workers = np.random.default_rng(salt)
    plan: list[Ints] = []
    # Not array_split: it hands its remainder to the first steps, on every worker at once.
    ends = np.arange(num_steps + 1) * len(shuffled) // max(1, num_steps)
    for first in range(0, num_steps, _WINDOW_STEPS):
        last = min(first + _WINDOW_STEPS, num_steps)
        window = shuffled[ends[first] : ends[last]]
        window = window[np.argsort(rows.tokens.lengths[window], kind="stable")]
        cuts = ends[first : last + 1] - ends[first]
        steps = [window[start:end] for start, end in itertools.pairwise(cuts)]
        plan += [steps[position] for position in same_on_all_workers.permutation(len(steps))]
    return plan


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(
        ids=np.concatenate([np.empty(0, dtype=np.int32), *(part.ids for part in parts)]),
        starts=np.cumsum(np.concatenate([[0], *(part.lengths for part in parts)]), dtype=np.int64),
    )


def _mix(keys: Keys, salt: np.random.SeedSequence) -> Keys:
    """Hash keys with a salt (the finalizer of splitmix64)."""
    mixed = keys ^ salt.generate_state(1, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _read_batches(folder: Path) -> Iterator[Mapping[str, list[Any]]]:
    wanted = ("row_id", "text", "gold", "label", "confidence")
    for path in read_shards(folder):
        with pq.ParquetFile(path) as file:
            columns = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=columns):
                yield batch.to_pydict()
