"""Which rule, and which labels, make the best student in the same number of steps?

Each DATA is a folder with train.parquet, columns `text` and `label`; its name chooses the
experiment, jobs/configs/NAME.toml. SmolLM2 labels 2,000 of its texts once, as a user would have
it done, by jobs/prepare.py and jobs/label.py; then jobs/compare.py trains every rule with every
seed on the same labels for 23 % of eight epochs' steps, and scores the last epoch on gold test
rows. Labels are calibrated by `batch`, but for the lines named stacked: those have `stacked`, which
about 180 gold validation rows are for. `all-8-epochs` takes all of these steps, and `slice` is
trained on the human's labels of as many rows as are validation, and on nothing else.

Trials compute in bfloat16, or with --float32 as processors without it do faster. The seconds of one
are those on one core while the others train on the other cores.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import figures

from llkd_ray.config import RULES, load_experiment
from llkd_ray.errors import CorpusError
from llkd_ray.lineage import Lineage

JOBS = figures.JOBS
Lines = dict[str, dict[str, float]]
"""Figures of each line of a comparison."""
# Shares of train.parquet, so that about 180 rows are validation and 500 are test.
SPLITS = {
    "trec6": (0.0367, 0.12),
    "snips": (0.0153, 0.05),
    "csabstruct": (0.0182, 0.05),
    "ag_news": (0.0667, 0.14),
}
LABELLED_ROWS, SLICE_ROWS = 2000, 180
# Of 32 rows: less than a quarter of eight epochs, and all of them.
STEPS, ALL_STEPS = 113, 500
TRAINING = (
    "train.learning_rate=2e-4",
    "train.average_decay=0.95",
    "train.keep_signals=false",
    "student.head=mean",
    "student.max_length=64",
)
VARIANTS = {
    "llkd-stacked": ("selection.rule=llkd", "calibration.kind=stacked"),
    "top-stacked": ("selection.rule=top-fraction", "calibration.kind=stacked"),
    "joint-stacked": ("selection.rule=joint", "calibration.kind=stacked"),
    "all-stacked": ("selection.rule=all", "calibration.kind=stacked"),
    "slice": ("selection.rule=gold", f"teacher.max_unlabeled_rows={SLICE_ROWS}"),
    "all-8-epochs": ("selection.rule=all", f"train.steps={ALL_STEPS}"),
}


def show(quality: dict[str, Lines]) -> dict[str, Any]:
    """Print a table for each data set, and return all of it."""
    for data, of_data in quality.items():
        print(
            figures.table(
                [data, "accuracy", "macro-F1", "sd", "over all", "low", "high", "rows", "seconds"],
                [
                    [name, *(line.get(key) for key in ("accuracy", "macro_f1", "macro_f1_sd",
                     "over_all", "over_all_low", "over_all_high", "row_steps", "seconds"))]
                    for name, line in of_data.items()
                ],
            )
        )  # fmt: skip
    return dict(quality)


def compared(
    folder: Path,
    *,
    runs: Path,
    variants: Mapping[str, Sequence[str]],
    seeds: int,
    steps: int,
    rows: int,
    training: Sequence[str],
) -> Lines:
    """Label one data set and compare the variants on it, by name.

    Args:
        folder: Of the data set.
        runs: Folder of the runs; what is there already is not done again.
        variants: Names, each a rule or with the overrides that it stands for.
        seeds: How many.
        steps: Of a trial.
        rows: To label.
        training: Overrides that all trials share.

    Raises:
        LLKDError: It has no experiment or no file, or a job has failed.
    """
    experiment = JOBS / f"configs/{folder.name}.toml"
    source = folder / "train.parquet"
    if folder.name not in SPLITS:
        raise CorpusError(f"{folder}: no data set of this benchmark; there are {', '.join(SPLITS)}")
    if not source.is_file():
        raise CorpusError(f"{folder}: there is no train.parquet; put gold rows there")
    validation, test = SPLITS[folder.name]
    overrides = [
        f"runs={runs}",
        f"corpus.source={source}",
        f"task.examples_source={source}",
        f"corpus.validation_fraction={validation}",
        f"corpus.test_fraction={test}",
        f"teacher.max_unlabeled_rows={rows}",
        'teacher.splits=["unlabeled","validation","test"]',
    ]
    figures.job("prepare", experiment, overrides)
    # Each way to calibrate, and each number of rows, is a labels artifact; one ledger is behind.
    figures.job("label", experiment, overrides)
    settings = {setting for of_variant in variants.values() for setting in of_variant}
    for of_labels in sorted(settings):
        if of_labels.startswith(("calibration.", "teacher.")):
            figures.job("label", experiment, [*overrides, of_labels])
    overrides += [
        *training,
        f"train.steps={steps}",
        f"compare.seeds={json.dumps(list(range(seeds)))}",
        f"compare.rules={json.dumps([name for name in variants if name in RULES])}",
        *(
            f"compare.variants.{name}={json.dumps(of_variant)}"
            for name, of_variant in variants.items()
            if name not in RULES
        ),
    ]  # fmt: skip
    figures.job("compare", experiment, overrides)
    made = Lineage(load_experiment(experiment, overrides)).comparison
    return lines_of(json.loads((made.path / "table.json").read_text(encoding="utf-8")))


def lines_of(table: dict[str, Any]) -> Lines:
    """Return the lines of a comparison's last epochs, the teacher's first."""
    lines: Lines = {"teacher": table["teacher"]}
    for line in table["lines"]:
        if line["criterion"] == "last":
            over = line["over"].get("all", {})
            lines[line["variant"]] = {
                **{key: line[key] for key in ("accuracy", "macro_f1", "macro_f1_sd")},
                "validation": line["validation_macro_f1"],
                **({"over_all": over["value"]} if over else {}),
                **{f"over_all_{end}": over[end] for end in ("low", "high") if over},
                **{key: line[key] for key in ("row_steps", "steps", "seconds")},
            }
    return {
        name: {key: round(value, 4) for key, value in line.items() if value is not None}
        for name, line in lines.items()
    }


def run(
    summary: str | None,
    quick: Mapping[str, Sequence[str]],
    variants: Mapping[str, Sequence[str]],
    show: Callable[[dict[str, Lines]], dict[str, Any]],
) -> int:
    """Compare variants on the data sets that the command line names; return the exit status.

    Args:
        summary: What the benchmark measures, for `--help`.
        quick: The variants of `--quick`.
        variants: All there are, each a rule or with the overrides that it stands for.
        show: Prints tables of what was found, by data set, and returns the figures.
    """
    parser = figures.parser_of(
        summary,
        f"{' and '.join(quick)} alone, one seed, 200 rows of the first data set, within four "
        "minutes",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="folder of a data set")
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help="let trials compute in float32")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those there")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.data]
    seeds, steps, rows = arguments.seeds, STEPS, LABELLED_ROWS
    chosen: Mapping[str, Sequence[str]] = {name: variants[name] for name in arguments.variants}
    if arguments.quick:
        folders, chosen, seeds, steps, rows = folders[:1], quick, 1, 10, 200
    with tempfile.TemporaryDirectory() as temporary:
        compare = functools.partial(
            compared,
            runs=(arguments.runs or Path(temporary)).resolve(),
            variants=chosen,
            seeds=seeds,
            steps=steps,
            rows=rows,
            training=(*TRAINING, f"train.bf16={'false' if arguments.float32 else 'true'}"),
        )

        def benchmark() -> dict[str, Any]:
            started = time.perf_counter()
            found = show({folder.name: compare(folder) for folder in folders})
            return {**found, "seconds": round(time.perf_counter() - started, 1)}

        return figures.run(benchmark)


def main() -> int:
    quick = {"all": (), "llkd-stacked": VARIANTS["llkd-stacked"]}
    return run(__doc__, quick, {**dict.fromkeys(RULES, ()), **VARIANTS}, show)


if __name__ == "__main__":
    sys.exit(main())
