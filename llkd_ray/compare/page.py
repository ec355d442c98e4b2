"""The table of a comparison, as text."""

from collections.abc import Mapping, Sequence

from llkd_ray.compare.table import Difference, Line

_HEADER = (
    "rule",
    "chosen by",
    "accuracy",
    "macro-F1",
    "validation",
    "over all",
    "over random",
    "best epoch's",
    "rows used",
    "steps",
    "seconds",
)


def as_text(lines: Sequence[Line], teacher: Mapping[str, float]) -> str:
    """Lay out the table, best macro-F1 first within each criterion.

    Args:
        lines: Of the table.
        teacher: Its accuracy and macro_f1 on the same test rows.
    """
    criteria = list(dict.fromkeys(line.criterion for line in lines))
    ranked = sorted(lines, key=lambda line: (criteria.index(line.criterion), -line.macro_f1))
    cells = [
        list(_HEADER),
        ["(teacher)", "", f"{teacher['accuracy']:.3f}", f"{teacher['macro_f1']:.3f}", *[""] * 7],
        *(
            [
                line.variant,
                line.criterion,
                _mean(line.accuracy, line.accuracy_sd),
                _mean(line.macro_f1, line.macro_f1_sd),
                "" if line.validation_macro_f1 is None else f"{line.validation_macro_f1:.3f}",
                _interval(line.over.get("all")),
                _interval(line.over.get("random")),
                f"{line.best_macro_f1:.3f}",
                f"{line.rows_used_fraction:.0%}",
                f"{line.steps:.0f}",
                f"{line.seconds:.0f}",
            ]
            for line in ranked
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
    return "\n".join(rows) + "\n"


def _mean(value: float, sd: float | None) -> str:
    return f"{value:.3f}" + ("" if sd is None else f" ±{sd:.3f}")


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
