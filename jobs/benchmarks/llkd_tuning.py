"""Which settings of llkd make the best student, by validation rows alone?

Each DATA is a folder as student_quality.py takes it, and labels, steps and seeds are those of that
benchmark. One setting of the rule, or the teacher's calibration, is changed at a time; the
teacher's decay only with `cadence=step`, for from epoch to epoch its signals stay. A setting is
chosen by the macro-F1 on some 180 gold validation rows after the last epoch, and the table at the
end is of these alone; that of jobs/compare.py, which is printed on the way, has test rows too, by
which nothing is chosen. `vector` and `stacked` are left out, since they are fitted on these very
validation rows: `stacked` had 0.93 on them and 0.81 on trec6's test rows.
"""

import statistics
import sys
from typing import Any

import figures
import student_quality

DEFAULT = "llkd"
_LLKD = ("selection.rule=llkd",)
_STEP = (*_LLKD, "selection.cadence=step")
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "student-half": (*_LLKD, "selection.student_decay=0.5"),
    "student-slow": (*_LLKD, "selection.student_decay=0.9"),
    "class-term-probability": (*_LLKD, "selection.class_term=mean_probability"),
    "cadence-step": (*_STEP, "selection.teacher_decay=0.99", "selection.student_decay=0.99"),
    "cadence-step-fast": (*_STEP, "selection.teacher_decay=0.9", "selection.student_decay=0.9"),
    "weight-sum": (*_LLKD, "selection.weight=sum"),
    "weight-confidence": (*_LLKD, "selection.weight=confidence"),
    "weight-uncertainty": (*_LLKD, "selection.weight=uncertainty"),
    "weight-one": (*_LLKD, "selection.weight=one"),
    "calibration-none": (*_LLKD, "calibration.kind=none"),
    "calibration-contextual": (*_LLKD, "calibration.kind=contextual"),
    "calibration-temperature": (*_LLKD, "calibration.kind=temperature"),
}
"""What is changed of the rule's defaults and of `calibration.kind = "batch"`."""


def show(of_data: dict[str, student_quality.Lines]) -> dict[str, Any]:
    """Print the settings, best first.

    Returns:
        Of each setting the macro-F1 on validation rows by data set, their mean, and `row_steps`,
        the rows trained on by data set.
    """
    found: dict[str, Any] = {}
    for name in next(iter(of_data.values())):
        if name == "teacher":
            continue
        scores = {data: lines[name]["validation"] for data, lines in of_data.items()}
        rows = {data: lines[name]["row_steps"] for data, lines in of_data.items()}
        mean = round(statistics.mean(scores.values()), 4)
        found[name] = {**scores, "mean": mean, "row_steps": rows}
    print(
        figures.table(
            ["validation macro-F1", *of_data, "mean"],
            [
                [name, *(line[data] for data in of_data), line["mean"]]
                for name, line in sorted(found.items(), key=lambda item: -item[1]["mean"])
            ],
        )
    )
    return found


def main() -> int:
    quick = {name: VARIANTS[name] for name in (DEFAULT, "weight-one")}
    return student_quality.run(__doc__, quick, VARIANTS, show)


if __name__ == "__main__":
    sys.exit(main())
