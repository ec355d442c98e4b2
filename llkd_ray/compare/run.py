"""Run all trials of a comparison as Ray tasks, and write its table and plot."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from llkd_ray.artifacts import fingerprint, write_text
from llkd_ray.cluster import TRAINING_SPIN, result_of
from llkd_ray.compare.plots import curves
from llkd_ray.compare.table import Line, tabulate
from llkd_ray.compare.trial import Trial, read_gold, read_trial, run_trial
from llkd_ray.compare.variants import Variant, variants_of
from llkd_ray.config import Experiment, RandomRule, rule_named
from llkd_ray.errors import LLKDError
from llkd_ray.lineage import Lineage
from llkd_ray.metrics import accuracy, macro_f1
from llkd_ray.student.engine import read_expert_settings
from llkd_ray.student.model import check_student
from llkd_ray.student.train import UNTRAINED, count_rows, found_from_anywhere
from llkd_ray.student.worker import Work

_log = logging.getLogger(__name__)
_TRIALS = "trials"
BASELINES = ("all", "random")
"""Rules that the others are set against."""


@dataclass(frozen=True)
class Compared:
    """What came out."""

    lines: list[Line]
    teacher: dict[str, float]
    """accuracy and macro_f1 of the teacher on the same test rows."""
    test_rows: int


def compare(lineage: Lineage, out: Path) -> Compared:
    """Train every variant with every seed, and set them side by side.

    Needs a connection to Ray. A trial is kept beside the artifacts, named by all that decides it:
    one that an earlier comparison has made, even one that was killed, is not run again.

    Reads:
        labels/unlabeled, labels/test (schema.labels), corpus/validation (schema.TEXT).

    Writes:
        runs/NAME/trials/FINGERPRINT.{npz,json}, out/table.json, out/curves.svg.

    Args:
        lineage: Of an experiment whose corpus and labels are made; on more than one machine, in a
            shared folder.
        out: Folder of the comparison in the making.

    Raises:
        ArtifactError: No labelled test row has gold, or a variant asks for labels never made.
        ConfigError: A variant's override does not fit.
        StudentError: The encoder of a variant cannot be loaded.
    """
    experiment, names = lineage.experiment, lineage.experiment.task.label_names
    test = (lineage.labels.path / "test").resolve()
    gold, of_teacher = read_gold(test, names)
    variants = variants_of(experiment)
    for variant in variants:
        check_student(variant.experiment.student)
    files = {
        (variant.name, seed): _file(lineage, variant, seed)
        for variant in variants
        for seed in experiment.compare.seeds
    }
    works = {variant.name: _work(variant, out) for variant in variants}
    for name, seed, trial in _trials(experiment, variants, works, test, files):
        last = trial.predicted[-1]
        _log.info(
            "compare: %s, seed %d: %d epochs, %d row-steps, %.0f s; last epoch on test: "
            "accuracy %.3f, macro-F1 %.3f",
            *(name, seed, len(trial.epochs), trial.epochs[-1]["row_steps"], trial.seconds),
            *(accuracy(gold, last), macro_f1(gold, last, len(names))),
        )
    shutil.rmtree(out / UNTRAINED, ignore_errors=True)
    done = {
        variant.name: [
            found
            for seed in experiment.compare.seeds
            if (found := read_trial(files[variant.name, seed]))
        ]
        for variant in variants
    }
    lines = tabulate(
        done,
        gold,
        len(names),
        baselines=BASELINES,
        resamples=experiment.evaluate.bootstrap_resamples,
        seed=experiment.seed,
    )
    teacher = {
        "accuracy": accuracy(gold, of_teacher),
        "macro_f1": macro_f1(gold, of_teacher, len(names)),
    }
    tree = {
        "teacher": teacher,
        "test_rows": len(gold),
        "seeds": list(experiment.compare.seeds),
        "lines": [asdict(line) for line in lines],
    }
    write_text(out / "table.json", json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "curves.svg", curves(done, gold, len(names), teacher["macro_f1"]))
    return Compared(lines, teacher, len(gold))


def _trials(
    experiment: Experiment,
    variants: Sequence[Variant],
    works: dict[str, Work],
    test: Path,
    files: dict[tuple[str, int], Path],
) -> Iterator[tuple[str, int, Trial]]:
    """Yield the trials as they come to their end, those that were there first."""
    train = experiment.train

    @ray.remote(
        num_cpus=train.cpus_per_worker,
        num_gpus=1 if train.use_gpu else 0,
        runtime_env={"env_vars": TRAINING_SPIN},
    )
    def run(work: Work, out: Path, matched: tuple[int, ...]) -> tuple[int, ...]:
        if matched:
            work = replace(work, selection=RandomRule(kept=matched))
        run_trial(work, test, out)
        trial = read_trial(out)
        assert trial is not None
        return trial.kept

    waiting: dict[Any, tuple[str, int]] = {}
    kept: dict[int, Any] = {}
    for seed in experiment.compare.seeds:
        for variant in variants:
            file = files[variant.name, seed]
            there = read_trial(file)
            if there is not None:
                answer: Any = there.kept
                yield variant.name, seed, there
            else:
                work = replace(works[variant.name], seed=seed)
                answer = run.remote(work, file, kept[seed] if variant.matched else ())
                waiting[answer] = variant.name, seed
            if variant.name == "llkd":
                kept[seed] = answer
    while waiting:
        [answer], _ = ray.wait(list(waiting), num_returns=1)
        name, seed = waiting.pop(answer)
        try:
            result_of(answer)
        except LLKDError as error:
            raise type(error)(f"{name}, seed {seed}: {error}") from None
        trial = read_trial(files[name, seed])
        assert trial is not None
        yield name, seed, trial


def _work(variant: Variant, out: Path) -> Work:
    experiment = variant.experiment
    validation = (variant.rows.corpus.path / "validation").resolve()
    return Work(
        labels=(variant.rows.labelled.require().path / "unlabeled").resolve(),
        validation=validation if count_rows(validation, with_gold=True) else None,
        label_names=experiment.task.label_names,
        selection=experiment.selection,
        student=found_from_anywhere(experiment.student, experiment.cache, out / UNTRAINED),
        train=experiment.train,
        expert=read_expert_settings(experiment.train),
        seed=experiment.seed,
    )


def _file(lineage: Lineage, variant: Variant, seed: int) -> Path:
    """Return where a trial is kept, without its ending; the name follows from what decides it."""
    rows = variant.rows.labelled
    settled = Lineage(variant.experiment.model_copy(update={"seed": seed}))
    decides = settled.student(rows=rows).fingerprint
    if variant.matched:
        own = rule_named("llkd", lineage.experiment.selection)
        llkd = settled.experiment.model_copy(update={"selection": own})
        like = Lineage(llkd).student(rows=rows).fingerprint
        decides = fingerprint({"random": decides, "like": like})
    return (lineage.run / _TRIALS / decides).resolve()
