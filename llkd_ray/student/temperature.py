"""Make the student as sure as it is right: one temperature, divided into the weights of its head.

A student of noisy labels may be too sure or, taught by soft targets or few steps, not sure enough;
the temperature is then below 1. Because it stands in the weights, whatever computes the exported
student gives calibrated probabilities: torch, ONNX Runtime in float32 or int8, and other programs
that load the folder. All logits of a text are divided by the same number, so labels stay.

Shape legend: N rows, C classes.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers.utils import logging

from llkd_ray.corpus import read_shards
from llkd_ray.metrics import Floats, softmax
from llkd_ray.selection import Probabilities
from llkd_ray.student.batches import split_ids, tokenize
from llkd_ray.student.evaluate import class_probabilities
from llkd_ray.student.model import TEMPERATURE, load_student
from llkd_ray.student.stopping import held_out
from llkd_ray.teacher.calibration import fit_temperature

# One number needs no more rows, and rows of a split come in the order of a hash.
_MOST_ROWS = 5_000


@dataclass(frozen=True)
class Temperature:
    """What the logits of a trained student are divided by, and how that was found."""

    value: float
    fitted_on: Literal["gold", "labels", "nothing"]
    """Gold of the validation split; without any, the teacher's labels of rows held out of training,
    and then confidence is how often the student agrees with its teacher; without either, 1."""
    rows: int

    @property
    def summary(self) -> str:
        """What was done, in a few words."""
        match self.fitted_on:
            case "gold":
                return f"{self.value:g}, fitted on {self.rows} validation rows with gold"
            case "labels":
                return (
                    f"{self.value:g}, fitted on the teacher's labels of {self.rows} rows held "
                    "out of training, so that it tells how often the student agrees with its "
                    "teacher"
                )
            case "nothing":
                return "1, since no validation row has gold and none was held out of training"


UNCHANGED = Temperature(1.0, "nothing", 0)


def find_temperature(
    student: Path,
    corpus: Path,
    labels: Path,
    label_names: tuple[str, ...],
    *,
    max_length: int,
    batch_size: int,
    held_out_fraction: float,
    seed: int,
) -> Temperature:
    """Fit the temperature of a trained student.

    Reads:
        corpus/validation/shard-*.parquet (schema.TEXT); where none of them has gold, the rows of
        labels/unlabeled/shard-*.parquet (schema.labels) that were held out of training.

    Args:
        student: Plain Hugging Face folder, its head as trained.
        corpus: Folder of the corpus artifact.
        labels: Folder of the labels artifact.
        label_names: The C classes, in the order of the student's outputs.
        max_length: Tokens of a text that the student reads.
        batch_size: Rows of a forward pass.
        held_out_fraction: `train.stopping.held_out_fraction`.
        seed: The experiment's, which chose the rows held out.

    Raises:
        StudentError: The student cannot be loaded.
    """
    with_gold = list(islice(_answers(corpus / "validation", "gold"), _MOST_ROWS))
    apart = _answers(labels / "unlabeled", "label", held_out_fraction, seed)
    rows = with_gold or list(islice(apart, _MOST_ROWS))
    if not rows:
        return UNCHANGED
    texts, right = zip(*rows, strict=True)
    model, tokenizer = load_student(student)
    probabilities = class_probabilities(
        model,
        tokenize(tokenizer, list(texts), max_length),
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        num_classes=len(label_names),
        device=torch.device("cpu"),
    )
    positions = np.array([label_names.index(name) for name in right], dtype=np.int64)
    value = fit_temperature(_logits(probabilities), positions, hold=1.0)
    # The last digits are rounding, and a resumed run is to end with the same weights.
    return Temperature(round(value, 4), "gold" if with_gold else "labels", len(rows))


def set_temperature(student: Path, temperature: Temperature) -> None:
    """Divide the weights of an exported student's head by the temperature, once.

    Raises:
        StudentError: The student cannot be loaded.
    """
    assert read_temperature(student) is None, f"{student} has its temperature already"
    model, _ = load_student(student)
    _divide_head(model, temperature.value)
    setattr(model.config, TEMPERATURE, asdict(temperature))
    if not torch.cuda.is_available():
        # Saving makes transformers import DeepSpeed, which otherwise warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable_progress_bar()  # Of a file that takes no time.
    try:
        model.save_pretrained(student)
    finally:
        logging.enable_progress_bar()


def undo_temperature(model: Any) -> None:
    """Make of a loaded student, calibrated or not, what it was when it had been trained."""
    told = vars(model.config).pop(TEMPERATURE, None)
    if told is not None:
        _divide_head(model, 1 / told["value"])


def read_temperature(student: Path) -> Temperature | None:
    """Return what `set_temperature` did to a student's folder, None where it did nothing."""
    tree = json.loads((student / "config.json").read_text(encoding="utf-8"))
    return Temperature(**tree[TEMPERATURE]) if TEMPERATURE in tree else None


def as_trained(probabilities: Floats | Probabilities, temperature: Temperature) -> Floats:
    """Return what the probabilities [N, C] of a calibrated student were before."""
    return softmax(_logits(probabilities) * temperature.value)


def _divide_head(model: Any, value: float) -> None:
    head = _head(model)
    head.weight.data /= value
    if head.bias is not None:
        head.bias.data /= value


def _head(model: Any) -> nn.Linear:
    """Return the layer whose outputs are the logits: in every architecture the last of this size.

    Nothing that bends them comes after it: a classifier's logits are an affine map.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return next(
        module for module in reversed(linear) if module.out_features == model.config.num_labels
    )


def _logits(probabilities: Floats | Probabilities) -> Floats:
    """Return logits [N, C] with this softmax; a probability that is no more than 0 stays tiny."""
    floored = np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)
    logits: Floats = np.log(floored)
    return logits


def _answers(
    split: Path, column: str, fraction: float = 1.0, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield texts and answers of the rows that have one; of a share of the rows, those held out."""
    for shard in read_shards(split) if fraction else ():
        table = pq.read_table(shard, columns=["row_id", "text", column]).to_pydict()
        chosen = held_out(split_ids(table["row_id"])[:, 0], fraction, seed).tolist()
        for apart, text, answer in zip(chosen, table["text"], table[column], strict=True):
            if apart and answer is not None:
                yield text, answer
