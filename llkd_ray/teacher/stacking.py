"""A second opinion beside the teacher's: what a little gold says about texts like this one.

Shape legend: N rows, C classes, D numbers in an embedding.
"""

import math
from dataclasses import dataclass

import numpy as np

from llkd_ray.metrics import softmax
from llkd_ray.teacher.calibration import LEAST_LOGIT, Calibration, Floats, Ints
from llkd_ray.teacher.embedding import Floats as Embeddings

# How strongly the weights are held towards zero, in rows; without end, the teacher speaks alone.
_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, math.inf)
_FOLDS = 5
_BIAS_STRENGTH = 2.0
_MAX_STEPS = 300


@dataclass(frozen=True)
class Stacking:
    """A logistic regression over the teacher's log-probabilities and the text's embedding.

    Its distribution is softmax(scale * logits + embeddings @ weights + bias): the teacher's, as
    sharp as it deserves, times one that comes from the text itself.
    """

    teacher: Calibration
    scale: float
    bias: Floats
    """[C]"""
    weights: Floats
    """[D, C]"""
    strength: float
    """How strongly the weights were held towards zero; infinite: they are zero."""

    def probabilities(self, logprobs: Floats, embeddings: Embeddings) -> Floats:
        """Return the distribution [N, C] over the labels."""
        logits = _floored(self.teacher.logits(logprobs))
        return softmax(self.scale * logits + embeddings @ self.weights + self.bias)


def fit_stacking(
    teacher: Calibration, logprobs: Floats, embeddings: Embeddings, gold: Ints
) -> Stacking:
    """Return the stacking under which gold is likeliest, held towards the teacher.

    How strongly is chosen by cross-validation: what lets the left-out fifth be likeliest.

    Source: stacked generalization, Wolpert 1992, Neural Networks 5(2), with the teacher and an
    encoder for the models to be stacked; that the teacher's classes share a scale is ours.

    Args:
        teacher: Takes the labels' prior off log-probabilities.
        logprobs: Of the teacher [N, C], N at least 1.
        embeddings: Of the texts [N, D].
        gold: Position of the right label of each row [N].
    """
    logits = _floored(teacher.logits(logprobs))
    fold = np.arange(len(gold)) % _FOLDS

    def loss(strength: float) -> float:
        total = 0.0
        for left_out in map(fold.__eq__, range(min(_FOLDS, len(gold)))):
            known = ~left_out
            scale, bias, weights = _fit(logits[known], embeddings[known], gold[known], strength)
            p = softmax(scale * logits[left_out] + embeddings[left_out] @ weights + bias)
            total -= float(np.log(p[np.arange(len(p)), gold[left_out]] + 1e-300).sum())
        return total

    strength = min(_STRENGTHS, key=loss)
    return Stacking(teacher, *_fit(logits, embeddings, gold, strength), strength)


def _fit(
    logits: Floats, embeddings: Embeddings, gold: Ints, strength: float
) -> tuple[float, Floats, Floats]:
    """Minimize the negative log-likelihood, which is convex, by L-BFGS."""
    import torch  # Heavy, and no other calibration needs it.

    rows, num_classes = logits.shape
    texts = torch.from_numpy(embeddings.astype(np.float64))
    if math.isinf(strength):
        texts, strength = texts[:, :0], 0.0
    told, right = torch.from_numpy(logits), torch.from_numpy(gold)
    scale = torch.ones((), dtype=torch.float64)
    bias = torch.zeros(num_classes, dtype=torch.float64)
    weights = torch.zeros(texts.shape[1], num_classes, dtype=torch.float64)
    parameters = [value.requires_grad_() for value in (scale, bias, weights)]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=_MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        z = scale * told + texts @ weights + bias
        held = _BIAS_STRENGTH * bias.square().sum() + strength * weights.square().sum()
        loss: torch.Tensor = torch.nn.functional.cross_entropy(z, right) + held / 2 / rows
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if rows:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    full = np.zeros((embeddings.shape[1], num_classes))
    full[: len(weights)] = weights.detach().numpy()
    return scale.item(), bias.detach().numpy(), full


def _floored(logits: Floats) -> Floats:
    """Set the likeliest label to 0 and the others below it, none infinitely far."""
    below_best: Floats = logits - logits.max(axis=1, keepdims=True)
    return np.clip(below_best, LEAST_LOGIT, 0.0)
