"""Ask a student: class probabilities of tokenized rows, or of a folder of Parquet shards.

Shape legend: N rows, C classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from llkd_ray.corpus import read_shards
from llkd_ray.errors import StudentError
from llkd_ray.selection import Ints, Probabilities
from llkd_ray.student.batches import Tokens, by_length, pad, tokenize
from llkd_ray.student.model import load_student

_CHUNK_BATCHES = 16


def class_probabilities(
    model: Any,
    tokens: Tokens,
    positions: Ints | None = None,
    *,
    batch_size: int,
    pad_token_id: int,
    num_classes: int,
    device: torch.device,
    num_batches: int | None = None,
) -> Probabilities:
    """Return the model's probabilities of texts, [N, C], without gradients.

    Args:
        model: A classifier, or a DeepSpeed engine around one; left in evaluation mode.
        tokens: Of the texts.
        positions: [N], which of them; all when not given.
        batch_size: Rows of one forward pass, sorted by length so that little is padded.
        pad_token_id: Of the tokenizer.
        num_classes: C.
        device: Of the model.
        num_batches: How many forward passes to run: with weights spread over workers (ZeRO 3)
            all of them must run the same number. As many as needed when not given.
    """
    model.eval()
    asked = np.arange(len(tokens)) if positions is None else positions
    result = np.empty((len(asked), num_classes), dtype=np.float32)
    needed = -(-len(asked) // batch_size)
    with torch.no_grad():
        for chosen in by_length(tokens.lengths[asked], batch_size, num_batches or needed):
            logits = model(**pad(tokens, asked[chosen], pad_token_id, device)).logits
            if len(chosen):
                result[chosen] = torch.softmax(logits.float(), dim=-1).cpu().numpy()
    return result


def predict(
    student: Path,
    split: Path,
    label_names: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
) -> Iterator[tuple[list[str], Probabilities]]:
    """Yield row ids and probabilities [rows, C] of a split, a few batches at a time.

    Rows come in the order of the shards; memory does not grow with the split.

    Reads:
        row_id, text.

    Args:
        student: Folder of an exported student.
        split: Folder with shard-*.parquet.
        label_names: The classes in the order wanted, those of the student in any order.
        max_length: Tokens after which a text is cut.
        batch_size: Rows of one forward pass.

    Raises:
        StudentError: The student cannot be loaded, or knows other classes.
    """
    model, tokenizer = load_student(student)
    order = _positions(model.config.label2id, label_names, student)
    for path in read_shards(split):
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size * _CHUNK_BATCHES, columns=["row_id", "text"])
            for batch in batches:
                columns = batch.to_pydict()
                probabilities = class_probabilities(
                    model,
                    tokenize(tokenizer, columns["text"], max_length),
                    batch_size=batch_size,
                    pad_token_id=tokenizer.pad_token_id,
                    num_classes=len(label_names),
                    device=torch.device("cpu"),
                )
                yield columns["row_id"], probabilities[:, order]


def _positions(label2id: dict[str, int], label_names: Sequence[str], student: Path) -> list[int]:
    if set(label2id) != set(label_names):
        raise StudentError(
            f"{student}: this student tells {', '.join(label2id)} apart, the experiment "
            f"{', '.join(label_names)}; evaluate it with the experiment that trained it"
        )
    return [label2id[name] for name in label_names]
