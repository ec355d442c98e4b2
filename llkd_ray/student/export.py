"""The student as others read it: a plain Hugging Face folder with a model card."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llkd_ray.artifacts import write_text
from llkd_ray.config import ON_GOLD
from llkd_ray.student.architectures import OURS
from llkd_ray.student.temperature import UNCHANGED, Temperature


@dataclass(frozen=True)
class Card:
    """What the model card says."""

    student: str
    """What it was before training, in a few words."""
    label_names: tuple[str, ...]
    max_length: int
    rows: int
    """Rows that the teacher labelled."""
    rule: str
    epochs: int
    details: Mapping[str, Any]
    """Those of `train.Trained`."""
    calibration: str = "batch"
    """Kind of calibration of the labels."""
    temperature: Temperature = UNCHANGED
    origin: str | None = None
    """Where the labels come from, where a teacher alone did not give them."""


def export(student: Path, out: Path, card: Card) -> None:
    """Copy a checkpoint's student folder and write its model card.

    `transformers.pipeline("text-classification", out)` loads the result; where the architecture is
    one of ours, only after `import llkd_ray.student.model`.

    Args:
        student: Hugging Face folder inside a checkpoint.
        out: The folder to make; what an earlier try left there is replaced.
        card: What README.md says.
    """
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(student, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_text(out / "README.md", _readme(card, ours=config["model_type"] in OURS))


def _readme(card: Card, *, ours: bool) -> str:
    known = "import llkd_ray.student.model  # transformers does not know this architecture.\n"
    used = f"{card.details['rows_used_fraction']:.1%}"
    labels = "\n".join(f"- {name}" for name in card.label_names)
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags:
- distillation
- llkd
---

# A text classifier distilled from a large language model

It tells these classes apart:

{labels}

## Use

```python
{known if ours else ""}from transformers import pipeline

classify = pipeline("text-classification", "PATH/OF/THIS/FOLDER")
classify("a text")
```

Texts are read up to {card.max_length} tokens.

## How it was made

- Student before training: {card.student}, with a fresh classification head.
- Labels: {card.origin or f"{card.rows} texts labelled by a language model; {_gold(card)}"}.
- Rows chosen by the rule `{card.rule}` (LLKD: arXiv 2411.08028): {used} of all row-steps were
  trained on, in {card.details["steps"]} optimizer steps.
- {_chosen(card)}
- Temperature of its confidence: {card.temperature.summary}. It stands in the head's weights, and
  changes no label.

`manifest.json` in the folder above names the settings, inputs, versions and commit.

Labels of a language model are wrong now and then, and a student learns some of its mistakes:
measure it on texts labelled by people before relying on it.
"""


def _gold(card: Card) -> str:
    if card.rule == "gold":
        return "trained on were the human labels of those that have one"
    if card.calibration in ON_GOLD:
        return (
            f"its answers were calibrated (`{card.calibration}`) on validation rows with a human "
            "label, and no other one was trained on"
        )
    return "no human label was trained on"


def _chosen(card: Card) -> str:
    details = card.details
    epoch, by = details["best_epoch"], details["chosen_by"]
    if by == "last":
        return f"The weights after epoch {epoch}, the last."
    if by == "held_out_macro_f1":
        return (
            f"The weights after epoch {epoch} of {card.epochs}, the best by macro-F1 against the "
            f"teacher's surest labels on rows held out: {details[by]:.3f}. Gold did not choose it."
        )
    return (
        f"The weights after epoch {epoch} of {card.epochs}, the best by macro-F1 on the validation "
        f"split: accuracy {details['validation_accuracy']:.3f}, macro-F1 {details[by]:.3f}. "
        "Being chosen by them, they are no test scores."
    )
