"""Which gold examples the teacher is shown: as they stand, so many of each label, or the nearest.

Shape legend: N texts, P examples in the pool, D numbers in an embedding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llkd_ray.config import Example, ShotsSection, TaskSection
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.pretrained import encoder_folder
from llkd_ray.teacher.wording import one_line

_BATCH = 32
# Sentence encoders are trained on a few sentences; what comes after changes the mean little.
_MAX_TOKENS = 256

Floats = npt.NDArray[np.float32]


class Shots(Protocol):
    """Examples for the prompt: a row is shown the shared ones, then its own."""

    @property
    def shared(self) -> tuple[Example, ...]:
        """Examples that every row is shown."""

    @property
    def candidates(self) -> tuple[Example, ...]:
        """Examples of which each row is shown its own."""

    @property
    def own_count(self) -> int:
        """How many of its own a row is shown at most."""

    def own(self, texts: Sequence[str]) -> list[tuple[Example, ...]]:
        """Return the examples that each of N texts alone is shown, the best one last."""


def choose_shots(task: TaskSection, section: ShotsSection, pool: Sequence[Example] = ()) -> Shots:
    """Choose examples from the task's own and, but for `fixed`, from a pool of more.

    Raises:
        TeacherError: A label has too few examples, there are none at all, or the encoder that
            compares texts is not there.
    """
    if section.kind == "fixed":
        return SharedShots(task.examples)
    distinct = {one_line(example.text): example for example in reversed((*task.examples, *pool))}
    examples = tuple(reversed(distinct.values()))
    if section.kind == "balanced":
        return SharedShots(_balanced(task, section.per_label, examples))
    if not examples:
        raise TeacherError(
            "teacher.shots.kind = 'nearest': there are no examples to choose from; give "
            "task.examples or task.examples_source"
        )
    encoder = _Encoder(section.encoder)
    embeddings = encoder.embed([example.text for example in examples])
    return NearestShots(examples, section.nearest, encoder, embeddings)


@dataclass(frozen=True)
class SharedShots:
    """The same examples for every row."""

    shared: tuple[Example, ...]
    candidates: tuple[Example, ...] = ()
    own_count: int = 0

    def own(self, texts: Sequence[str]) -> list[tuple[Example, ...]]:
        """Return no examples for each of N texts."""
        return [()] * len(texts)


def _balanced(
    task: TaskSection, per_label: int, examples: Sequence[Example]
) -> tuple[Example, ...]:
    """Take the first examples of each label, in rounds of one of each.

    A teacher leans to the label that it saw last and to an order that it saw before, so each round
    has an order of its own, and no label follows itself.
    """
    of = {
        name: [example for example in examples if example.label == name][:per_label]
        for name in task.label_names
    }
    for name, found in of.items():
        if len(found) < per_label:
            raise TeacherError(
                f"teacher.shots.per_label = {per_label}: the label {name!r} has {len(found)} "
                "examples; add some to task.examples or task.examples_source, or lower it"
            )
    chosen: list[Example] = []
    for number in range(per_label):
        # Drawn by a hash: the same on every machine and with every version of every library.
        order = sorted(of, key=lambda name: hashlib.sha256(f"{number} {name}".encode()).digest())
        if chosen and order[0] == chosen[-1].label:
            order[0], order[1] = order[1], order[0]
        chosen += [of[name][number] for name in order]
    return tuple(chosen)


@dataclass(frozen=True)
class NearestShots:
    """For each row the examples whose texts are the most like its own.

    Source: arXiv 2310.19596, k-NN demonstrations.
    """

    candidates: tuple[Example, ...]
    own_count: int
    encoder: "_Encoder"
    embeddings: Floats
    """Of the candidates, length 1 each [P, D]."""
    shared: tuple[Example, ...] = ()

    def own(self, texts: Sequence[str]) -> list[tuple[Example, ...]]:
        """Return the nearest examples of each of N texts, the nearest last, never itself."""
        likeness = self.encoder.embed(texts) @ self.embeddings.T
        return [
            self._nearest(one_line(text), row) for text, row in zip(texts, likeness, strict=True)
        ]

    def _nearest(self, text: str, likeness: Floats) -> tuple[Example, ...]:
        ranked = (self.candidates[at] for at in np.argsort(-likeness, kind="stable"))
        others = [example for example in ranked if one_line(example.text) != text]
        return tuple(reversed(others[: self.own_count]))


class _Encoder:
    """Embeds texts, in float32 on the CPU."""

    def __init__(self, name: str) -> None:
        # Heavy, and only `nearest` needs them.
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModel, AutoTokenizer

        folder = encoder_folder(name)
        loading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **loading)
        # A copy whose settings never change again, so that threads can share it.
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.enable_truncation(min(_MAX_TOKENS, tokenizer.model_max_length))
        self._tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        self._model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **loading
        ).eval()

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return the mean of each text's last hidden states, scaled to length 1 [N, D]."""
        import torch

        parts = [np.zeros((0, self._model.config.hidden_size), dtype=np.float32)]
        for start in range(0, len(texts), _BATCH):
            rows = self._tokenizer.encode_batch(list(texts[start : start + _BATCH]))
            mask = torch.tensor([row.attention_mask for row in rows])
            with torch.inference_mode():
                states = self._model(
                    input_ids=torch.tensor([row.ids for row in rows]), attention_mask=mask
                ).last_hidden_state
                means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                parts.append(torch.nn.functional.normalize(means, dim=1).numpy())
        return np.concatenate(parts)
