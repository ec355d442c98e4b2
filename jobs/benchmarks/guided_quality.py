"""What do rows give that the teacher writes for the student's weaknesses (PGKD)?

Each DATA is a folder with train.parquet, columns `text` and `label`; its name chooses the
experiment, jobs/configs/NAME.toml. A student is trained on a small gold seed alone, then, by
jobs/guide.py, in rounds on what SmolLM2 writes about what it gets wrong; with everything, without
the validation report in the prompt, without wrong and hard rows in it, without the checks of the
texts but for length and leaks, and with only those texts in which the student reads the asked label
as well. Every student takes the same number of steps. All are scored on the same gold test rows,
beside the teacher, which answers as jobs/label.py has it do: without an example, and with the
examples that jobs/guide.py shows it, of the seed or task.examples. (Where it is not shown them,
task.examples stand in the corpus, a few of them among the test rows.)

Whether a written text has the label that was asked for, nobody knows; a judge says it: a student of
the same kind, trained on many gold rows. Of each variant's texts, those kept and those dropped by
each check, a second table has the share that the judge reads as asked.

The seed's rows are the same for every seed number, which is that of training and sampling;
task.examples are among them, so the student alone has all the gold that the teacher is shown.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import figures
import pyarrow.parquet as pq

from llkd_ray.cli import show_log
from llkd_ray.cluster import ray_session
from llkd_ray.config import load_experiment
from llkd_ray.errors import CorpusError
from llkd_ray.guided.asking import probabilities_of_texts
from llkd_ray.guided.rounds import best_of, make_round, make_seed, on_test
from llkd_ray.guided.seed import TRAIN
from llkd_ray.guided.sift import SAMPLES as WRITTEN
from llkd_ray.lineage import Lineage
from llkd_ray.student.train import MODEL

JOBS = figures.JOBS
# Shares of train.parquet for about 180 validation rows, which are not used, and 500 test rows.
SPLITS = {
    "trec6": (0.0367, 0.12),
    "snips": (0.0153, 0.05),
    "ag_news": (0.0667, 0.14),
    "banking77": (0.02, 0.06),
}
SEED_ROWS, SAMPLES = (100, 1000), 240
# Of 16 rows; each student is that of the best epoch among them.
STEPS = 150
TRAINING = (
    "train.learning_rate=2e-4",
    "train.batch_size=16",
    "train.num_workers=1",
    "train.threads_per_worker=2",
    "train.keep_signals=false",
    # Not in epochs: of those a student of more rows would take more steps, and gain by that alone.
    f"train.steps={STEPS}",
    "student.head=mean",
    "student.max_length=64",
)
SEED_ALONE, EVERYTHING = "seed alone", "guided"
VARIANTS: dict[str, tuple[str, ...]] = {
    EVERYTHING: (),
    "no-report": ("guide.report_tokens=0", "guide.weakness=0"),
    "no-hard": ("guide.shown.wrong=0", "guide.shown.hard=0", "guide.shown.correct=8"),
    "no-checks": (
        "guide.checks.noise=false",
        "guide.checks.min_confidence=0",
        "guide.checks.min_uncertainty=0",
    ),
    "student-agrees": ("guide.checks.student_agrees=true",),
}
FIGURES = ("accuracy", "macro_f1")
JUDGE_ROWS = 2500
JUDGE = (f"guide.seed_rows={JUDGE_ROWS}", "guide.validation_fraction=0.1", "train.steps=600")
KEPT = "kept"


def measure(
    folders: list[Path],
    runs: Path,
    variants: list[str],
    *,
    seed_rows: list[int],
    seeds: int,
    more: list[str],
) -> dict[str, Any]:
    """Guide every variant on every data set, and set it beside the seed alone.

    Args:
        folders: Of the data sets.
        runs: Folder of the runs; what is there already is not done again.
        variants: Names of VARIANTS.
        seed_rows: Sizes of the seed.
        seeds: How many.
        more: Overrides of the experiment.

    Raises:
        LLKDError: A data set has no experiment or no file, or a job has failed.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {}
    for folder in folders:
        common = [*overrides_of(folder, runs), *more]
        experiment = JOBS / f"configs/{folder.name}.toml"
        figures.job("prepare", experiment, common)
        judge = judge_of(experiment, common)
        for rows in seed_rows:
            lines: dict[str, Any] = {}
            for variant in variants:
                settings = [*common, f"guide.seed_rows={rows}", *VARIANTS[variant]]
                runs_of = [[*settings, f"seed={seed}"] for seed in range(seeds)]
                guided = [guided_of(experiment, overrides) for overrides in runs_of]
                lines.setdefault(SEED_ALONE, line_of([of[0] for of in guided], guided, rounds=0))
                lines[variant] = line_of([of[best_of(of)] for of in guided], guided)
                lines[variant]["judged"] = judged(experiment, runs_of, judge)
            lines = {
                **teachers_of(experiment, [*common, f"guide.seed_rows={rows}"]),
                **lines,
                f"student of {JUDGE_ROWS} gold rows": score_of(experiment, common, judge),
            }
            found[f"{folder.name} {rows}"] = lines
            title = f"{folder.name}, {rows} seed rows"
            print(table_of(title, lines), judged_table(title, lines), sep="\n", flush=True)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def overrides_of(folder: Path, runs: Path) -> list[str]:
    """Return what makes an experiment of a data set.

    Raises:
        CorpusError: It is none of this benchmark, or has no file.
    """
    if folder.name not in SPLITS:
        raise CorpusError(f"{folder}: no data set of this benchmark; there are {', '.join(SPLITS)}")
    source = folder / "train.parquet"
    if not source.is_file():
        raise CorpusError(f"{folder}: there is no train.parquet; put gold rows there")
    validation, test = SPLITS[folder.name]
    experiment = load_experiment(JOBS / f"configs/{folder.name}.toml")
    # jobs/guide.py shows the seed in the pool's place, but the pool has to be there.
    pool = [f"task.examples_source={source}"] if experiment.task.examples_source else []
    return [
        f"runs={runs}",
        f"corpus.source={source}",
        *pool,
        f"corpus.validation_fraction={validation}",
        f"corpus.test_fraction={test}",
        f"guide.samples={SAMPLES}",
        "serve.backend=torch",  # Nothing is served, so nothing is exported.
        *TRAINING,
    ]


def teachers_of(experiment: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Return the scores of the teacher without an example, and of the one that guides."""
    lineage = Lineage(load_experiment(experiment, overrides))
    few = list(overrides)
    if lineage.experiment.task.examples_source is not None:
        few.append(f"task.examples_source={lineage.seed.path / TRAIN}")
    none = [*overrides, "task.examples=[]", "teacher.shots.kind=fixed"]
    return {
        "teacher, no example": teacher_of(experiment, none),
        "teacher, few examples": teacher_of(experiment, few),
    }


def teacher_of(experiment: Path, overrides: list[str]) -> dict[str, Any]:
    """Label the test rows, and 200 others to calibrate on, and return the teacher's scores."""
    settings = [
        *overrides,
        'teacher.splits=["unlabeled","test"]',
        "teacher.max_unlabeled_rows=200",
    ]
    figures.job("prepare", experiment, settings)
    figures.job("label", experiment, settings)
    made = Lineage(load_experiment(experiment, settings)).labels.manifest()
    of_test = made.details["quality"]["batch"]["test"]
    return {name: round(of_test[name], 4) for name in FIGURES}


def guided_of(experiment: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Guide a student and return what its rounds came to."""
    figures.job("guide", experiment, overrides)
    made = Lineage(load_experiment(experiment, overrides)).guided
    rounds: list[dict[str, Any]] = json.loads((made.path / "rounds.json").read_text("utf-8"))
    return rounds


def judge_of(experiment: Path, overrides: list[str]) -> Path:
    """Train a student on many gold rows and return its folder."""
    lineage = Lineage(load_experiment(experiment, [*overrides, *JUDGE]))
    if not lineage.round(0).made:
        with ray_session(lineage.experiment.ray):
            make_seed(lineage)
            make_round(lineage, 0)
    return lineage.round(0).path / MODEL


def score_of(experiment: Path, overrides: list[str], student: Path) -> dict[str, Any]:
    """Return a student's scores on the gold test rows."""
    found = on_test(Lineage(load_experiment(experiment, overrides)), student)
    assert found is not None, "every data set here has test rows"
    scores = {name: round(found[name]["value"], 4) for name in FIGURES}
    return {
        **scores,
        **{f"accuracy_{end}": round(found["accuracy"][end], 4) for end in ("low", "high")},
    }


def judged(experiment: Path, runs: list[list[str]], judge: Path) -> dict[str, dict[str, Any]]:
    """Return for what was kept, and dropped for each reason: texts, and the share read as asked.

    Args:
        experiment: Of the data set.
        runs: Overrides of a guided distillation each, all of which count together.
        judge: Folder of the student that reads.
    """
    texts, right = Counter[str](), Counter[str]()
    for overrides in runs:
        of = load_experiment(experiment, overrides)
        lineage = Lineage(of)
        for number in range(1, lineage.guided.manifest().details["rounds"] + 1):
            written = pq.read_table(
                lineage.lessons(number).path / WRITTEN, columns=["text", "label", "dropped"]
            ).to_pylist()
            written = [row for row in written if row["text"]]
            read = probabilities_of_texts([row["text"] for row in written], judge, of)
            for row, position in zip(written, read.argmax(axis=1).tolist(), strict=True):
                reason = row["dropped"] or KEPT
                texts[reason] += 1
                right[reason] += of.task.label_names[position] == row["label"]
    return {
        reason: {"texts": count, "as_asked": round(right[reason] / count, 4)}
        for reason, count in texts.most_common()
    }


def line_of(
    chosen: list[dict[str, Any]], guided: list[list[dict[str, Any]]], *, rounds: int | None = None
) -> dict[str, Any]:
    """Return a line of the table: means over seeds; gain is over the same seed's round 0.

    Args:
        chosen: The round that counts, for each seed.
        guided: All rounds of each seed.
        rounds: Count what was written in the first so many; all of them when not given.
    """
    of_rounds = [row for rows in guided for row in (rows if rounds is None else rows[: rounds + 1])]
    dropped = Counter[str]()
    for row in of_rounds:
        dropped.update(row.get("dropped", {}))
    each = len(guided)
    line: dict[str, Any] = {}
    for name in FIGURES:
        values = [of["test"][name]["value"] for of in chosen]
        line[name] = round(statistics.mean(values), 4)
        line[f"{name}_sd"] = round(statistics.stdev(values), 4) if each > 1 else None
        # Of the test rows, for one student; what seeds differ by is the standard deviation.
        for end in ("low", "high"):
            line[f"{name}_{end}"] = round(
                statistics.mean(of["test"][name][end] for of in chosen), 4
            )
    gains = [
        of["test"]["accuracy"]["value"] - rows[0]["test"]["accuracy"]["value"]
        for of, rows in zip(chosen, guided, strict=True)
    ]
    last = [rows[-1]["test"]["accuracy"]["value"] for rows in guided]
    return {
        **line,
        "gain": round(statistics.mean(gains), 4),
        "gain_sd": round(statistics.stdev(gains), 4) if each > 1 else None,
        "round": statistics.mean(of["round"] for of in chosen),
        "loss": round(statistics.mean(of["loss"] for of in chosen), 4),
        "written": sum(row["written"] for row in of_rounds) / each,
        "kept": sum(row["kept"] for row in of_rounds) / each,
        "dropped": {reason: rows / each for reason, rows in dropped.most_common()},
        **{
            name: sum(row.get(name, 0) for row in of_rounds) / each
            for name in ("tokens", "prompt_tokens", "cached_tokens", "readout_tokens")
        },
        "last_accuracy": round(statistics.mean(last), 4) if rounds is None else None,
        "last_accuracy_sd": round(statistics.stdev(last), 4)
        if rounds is None and each > 1
        else None,
    }


def table_of(title: str, lines: dict[str, Any]) -> str:
    """Lay the lines out for people."""
    columns = ("accuracy", "accuracy_low", "accuracy_high", "gain", "gain_sd", "last_accuracy",
               "last_accuracy_sd", "macro_f1", "macro_f1_sd", "round", "written", "kept", "tokens",
               "prompt_tokens")  # fmt: skip
    return figures.table(
        [title, "accuracy", "low", "high", "gain", "sd", "last", "sd", "macro-F1", "sd", "round",
         "written", "kept", "tokens out", "tokens in"],
        [[name, *(line.get(column) for column in columns)] for name, line in lines.items()],
    )  # fmt: skip


def judged_table(title: str, lines: dict[str, Any]) -> str:
    """Lay out for people what the judge says of each variant's texts."""
    return figures.table(
        [title, "kept or dropped, since", "texts", "read as asked"],
        [
            [name, reason, of["texts"], of["as_asked"]]
            for name, line in lines.items()
            for reason, of in line.get("judged", {}).items()
        ],
    )


def main() -> int:
    parser = figures.parser_of(
        __doc__, "everything only, 100 rows, one seed, one round of 48 texts of the first data set"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="folder of a data set")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed-rows", nargs="+", type=int, default=list(SEED_ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those there")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="section.key=value", help="of every experiment"
    )
    arguments = parser.parse_args()
    # The judge is trained in this process, and tells of it as a job does.
    show_log()
    folders = [folder.resolve() for folder in arguments.data]
    variants, seed_rows = arguments.variants, arguments.seed_rows
    seeds, more = arguments.seeds, arguments.set
    if arguments.quick:
        folders, variants, seed_rows, seeds = folders[:1], [EVERYTHING], [100], 1
        more = [*more, "guide.rounds=1", "guide.samples=48"]
    with tempfile.TemporaryDirectory() as temporary:
        runs = (arguments.runs or Path(temporary)).resolve()
        return figures.run(
            lambda: measure(folders, runs, variants, seed_rows=seed_rows, seeds=seeds, more=more)
        )


if __name__ == "__main__":
    sys.exit(main())
