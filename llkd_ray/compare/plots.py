"""Learning curves of a comparison."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llkd_ray.compare.trial import Trial
from llkd_ray.metrics import Ints, macro_f1


def curves(
    trials: Mapping[str, Sequence[Trial]], gold: Ints, num_classes: int, teacher_macro_f1: float
) -> str:
    """Draw macro-F1 on the test rows against the rows trained on, as SVG.

    A thick line is the mean over the seeds, epoch by epoch, thin ones are the seeds.

    Args:
        trials: By variant.
        gold: Of the test rows.
        num_classes: Of the task.
        teacher_macro_f1: On the same rows.
    """
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(teacher_macro_f1, color="black", ls="--", lw=1, label="teacher")
    for position, (name, of_seeds) in enumerate(trials.items()):
        # Ten colours, five markers and four dashes: no two of twenty lines look alike.
        look: dict[str, Any] = {
            "color": f"C{position % 10}",
            "ls": ("-", "--", "-.", ":")[position // 10 % 4],
        }
        rows = [[row["row_steps"] for row in trial.epochs] for trial in of_seeds]
        scores = [[macro_f1(gold, of, num_classes) for of in trial.predicted] for trial in of_seeds]
        for x, y in zip(rows, scores, strict=True):
            axes.plot(x, y, **look, lw=0.6, alpha=0.5)
        # Some may have stopped early: the mean is over the epochs that all have.
        epochs = min(map(len, rows))
        axes.plot(
            np.mean([x[:epochs] for x in rows], axis=0),
            np.mean([y[:epochs] for y in scores], axis=0),
            **look,
            lw=2,
            marker="os^Dv"[position % 5],
            label=name,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("rows trained on, summed over the epochs")
    axes.set_ylabel("macro-F1 on gold test rows")
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower center", ncols=4)
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()
