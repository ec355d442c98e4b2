"""Which settings of llkd make the best student, by validation rows alone?

Each DATA is a folder as student_quality.py takes it, and labels, steps and seeds are those of that
benchmark. One setting of the rule, or the teacher's calibration, is changed at a time; the
teacher's decay only with `cadence=step`, for from epoch to epoch its signals stay. A setting is
chosen by the macro-F1 on some 180 gold validation rows after the last epoch; test rows are not
shown, so that student_quality.py can still say what the choice is worth. `vector` and `stacked`
are left out, since they are fitted on these very rows: `stacked` had 0.93 on them and 0.81 on
trec6's test rows.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import student_quality

DEFAULT = "llkd"
_STEP = ("selection.cadence=step",)
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "student-half": ("selection.student_decay=0.5",),
    "student-slow": ("selection.student_decay=0.9",),
    "class-term-probability": ("selection.class_term=mean_probability",),
    "cadence-step": (*_STEP, "selection.teacher_decay=0.99", "selection.student_decay=0.99"),
    "cadence-step-fast": (*_STEP, "selection.teacher_decay=0.9", "selection.student_decay=0.9"),
    "weight-sum": ("selection.weight=sum",),
    "weight-confidence": ("selection.weight=confidence",),
    "weight-uncertainty": ("selection.weight=uncertainty",),
    "weight-one": ("selection.weight=one",),
    "calibration-none": ("calibration.kind=none",),
    "calibration-contextual": ("calibration.kind=contextual",),
    "calibration-temperature": ("calibration.kind=temperature",),
}
"""What is changed of the rule's defaults and of `calibration.kind = "batch"`."""


def measure(
    folders: list[Path], compare: Callable[[Path], dict[str, dict[str, float]]]
) -> dict[str, Any]:
    """Compare the settings on every data set.

    Args:
        folders: Of the data sets.
        compare: `student_quality.compared`, for one of them.

    Returns:
        Of each setting `validation`, macro-F1 by data set and their mean, and `rows_used`, rows
        trained on as a share of the steps that were allowed.

    Raises:
        LLKDError: A data set has no experiment or no file, or a job has failed.
    """
    started = time.perf_counter()
    of_data = {folder.name: compare(folder) for folder in folders}
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
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    parser = figures.parser_of(
        __doc__, "two settings, one seed, 200 rows of the first data set, within four minutes"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="folder of a data set")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help="let trials compute in float32")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those there")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.data]
    names, seeds = arguments.variants, arguments.seeds
    steps, rows = student_quality.STEPS, student_quality.LABELLED_ROWS
    if arguments.quick:
        folders, names, seeds, steps, rows = folders[:1], [DEFAULT, "weight-one"], 1, 10, 200
    with tempfile.TemporaryDirectory() as temporary:
        compare = functools.partial(
            student_quality.compared,
            runs=(arguments.runs or Path(temporary)).resolve(),
            variants={
                name: settings if name == DEFAULT else ("selection.rule=llkd", *settings)
                for name, settings in VARIANTS.items()
                if name in names
            },
            seeds=seeds,
            steps=steps,
            rows=rows,
            training=student_quality.training(float32=arguments.float32),
        )
        return figures.run(lambda: measure(folders, compare))


if __name__ == "__main__":
    sys.exit(main())
