"""The rounds of a guided distillation, each an artifact that a killed run finds again.

Round 0 trains a student on the seed alone, or is the student that was trained on the teacher's
labels, which all further rounds then train on, too. Each further round has the teacher write rows
for what the last student gets wrong, and trains a student on the seed and all rows kept so far:
a fresh one or, with `guide.weights` = "last" and in the paper, the last one. The student with the
lowest validation loss is the result.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llkd_ray import storage
from llkd_ray.artifacts import Artifact, Rows, make, write_text
from llkd_ray.config import rule_named
from llkd_ray.guided.asking import report_of
from llkd_ray.guided.checks import NO_END
from llkd_ray.guided.lessons import author_of, write_lessons
from llkd_ray.guided.mixture import lay_out
from llkd_ray.guided.seed import TRAIN, write_seed
from llkd_ray.guided.sift import Sources
from llkd_ray.lineage import Lineage
from llkd_ray.student import train
from llkd_ray.student.scores import score_student

_log = logging.getLogger(__name__)
_LABELS = "labels"
# Above this share of texts without an end, `guide.sampling.max_tokens` is too small for the rows.
_MANY = 0.1
REPORT, ROUNDS = "report.json", "rounds.json"


def guide(lineage: Lineage, out: Path) -> tuple[Rows, dict[str, Any]]:
    """Go through the rounds, those that are made already aside, and leave the best student.

    Needs a connection to Ray.

    Writes:
        out/model, out/audit.parquet and out/epochs.parquet (the student of the best round, as
        `train.train` leaves it), out/rounds.json: of each round validation loss,
        accuracy and macro-F1, rows, reasons, tokens, and the score on the gold test rows, which
        chooses nothing.

    Returns:
        Rows generated in all rounds, and details: best_round, rounds, and its scores.

    Raises:
        ConfigError: The teacher cannot write, or there are too few rows with gold.
        ArtifactError: Round 0 is a student that is not trained yet.
    """
    author_of(lineage.experiment)
    section = lineage.experiment.guide
    make_seed(lineage)
    rounds = [make_round(lineage, 0)]
    while len(rounds) <= section.rounds and not is_over(rounds, section.patience):
        make_lessons(lineage, len(rounds))
        rounds.append(make_round(lineage, len(rounds)))
    best = best_of(rounds)
    student = lineage.round(best).require()
    shutil.copytree(student.path / train.MODEL, out / train.MODEL, dirs_exist_ok=True)
    for name in (train.AUDIT, train.EPOCHS):
        shutil.copyfile(student.path / name, out / name)
    for number, row in enumerate(rounds):
        row["test"] = on_test(lineage, lineage.round(number).path / train.MODEL)
    write_text(out / ROUNDS, json.dumps(rounds, indent=2, ensure_ascii=False) + "\n")
    taken = sum(row["written"] for row in rounds)
    kept = sum(row["kept"] for row in rounds)
    return Rows(taken=taken, kept=kept, rejected=taken - kept), {
        **student.manifest().details,
        "best_round": best,
        "rounds": len(rounds) - 1,
        "chosen_by": "validation loss",
        **{f"validation_{key}": rounds[best][key] for key in ("loss", "accuracy", "f1")},
        "test": rounds[best]["test"],
    }


def is_over(rounds: Sequence[dict[str, Any]], patience: int) -> bool:
    """Return whether so many rounds in a row did not lower the validation loss."""
    return len(rounds) - 1 - best_of(rounds) >= patience


def best_of(rounds: Sequence[dict[str, Any]]) -> int:
    """Return the round with the lowest validation loss, the first of equals."""
    return int(np.argmin([row["loss"] for row in rounds]))


def make_seed(lineage: Lineage) -> None:
    """Take the seed from the corpus."""
    experiment = lineage.experiment
    if not lineage.seed.made:
        with make(lineage.seed) as draft:
            draft.rows = write_seed(
                lineage.corpus.path, experiment.task, experiment.guide, draft.folder
            )


def make_lessons(lineage: Lineage, number: int) -> None:
    """Have a round's rows written and checked."""
    artifact = lineage.lessons(number)
    if artifact.made:
        return
    sources = Sources(
        corpus=lineage.corpus.path,
        seed=lineage.seed.path,
        lessons=tuple(lineage.lessons(earlier).path for earlier in range(1, number)),
        student=lineage.round(number - 1).path / train.MODEL,
    )
    with make(artifact, resume=True) as draft:
        draft.rows, draft.details = write_lessons(sources, lineage.experiment, number, draft.folder)
    dropped = ", ".join(f"{n} {reason}" for reason, n in draft.details["dropped"].items())
    _log.info(
        "guide: round %d: kept %d of %d texts; dropped: %s",
        *(number, draft.rows.kept, draft.rows.taken, dropped or "none"),
    )
    endless = draft.details["dropped"].get(NO_END, 0)
    if endless > _MANY * draft.rows.taken:
        _log.warning(
            "guide: %d of %d texts came to no end within guide.sampling.max_tokens = %d; raise it, "
            "if the seed has longer rows",
            *(endless, draft.rows.taken, lineage.experiment.guide.sampling.max_tokens),
        )


def make_round(lineage: Lineage, number: int) -> dict[str, Any]:
    """Train a round's student on the seed and all rows kept so far, and return what it came to."""
    artifact = lineage.round(number)
    if artifact.noun == "student":
        artifact.require()
    elif not artifact.made:
        with make(artifact, resume=True) as draft:
            trained = _train(lineage, number, draft.folder)
            draft.rows, draft.details = trained.rows, trained.details
    row = _row_of(lineage, number)
    _log.info(
        "guide: round %d: %d rows to train on, validation loss %.3f, accuracy %.3f, macro-F1 %.3f",
        *(number, row["training_rows"], row["loss"], row["accuracy"], row["f1"]),
    )
    return row


def _train(lineage: Lineage, number: int, folder: Path) -> train.Trained:
    """Train a round's student and leave it, with its validation report, in a folder."""
    experiment, labels = lineage.experiment, folder / _LABELS
    shutil.rmtree(labels, ignore_errors=True)
    counts = lay_out(_parts(lineage, number), labels / TRAIN)
    storage.put(labels)
    trained = train.train(
        labels,
        folder,
        corpus=lineage.seed.path,
        label_names=experiment.task.label_names,
        selection=rule_named(experiment.guide.rule, experiment.selection),
        student=experiment.student,
        section=experiment.train,
        seed=experiment.seed,
        cache=experiment.cache,
        origin=_origin([copied for _, copied in counts], number),
        start=_start(lineage, number),
    )
    shutil.rmtree(labels)
    found, _ = report_of(folder / train.MODEL, lineage.seed.path, experiment)
    write_text(folder / REPORT, json.dumps(asdict(found), indent=2) + "\n")
    return trained


def _row_of(lineage: Lineage, number: int) -> dict[str, Any]:
    """Return what a round that is made came to."""
    artifact = lineage.round(number)
    made, report = artifact.manifest(), _report(lineage, artifact.path)
    row = {
        "round": number,
        **{key: report[key] for key in ("loss", "accuracy", "f1")},
        "training_rows": made.rows.taken,
        "training_s": made.seconds,
        "written": 0,
        "kept": 0,
    }
    if number:
        lessons = lineage.lessons(number).manifest()
        row |= {"written": lessons.rows.taken, "kept": lessons.rows.kept}
        row |= {"lessons_s": lessons.seconds, **lessons.details}
    return row


def _start(lineage: Lineage, number: int) -> Path | None:
    """Return the student that a round's training goes on from."""
    if number == 0 or lineage.experiment.guide.weights == "fresh":
        return None
    return lineage.round(number - 1).path / train.MODEL


def _parts(lineage: Lineage, number: int) -> list[Artifact]:
    """Name what a round trains on; gold stands before the teacher's label of the same row."""
    labels = [lineage.labels] if lineage.experiment.guide.start == "student" else []
    return [lineage.seed, *(lineage.lessons(of) for of in range(1, number + 1)), *labels]


def _report(lineage: Lineage, student: Path) -> dict[str, Any]:
    """Return a student's validation report, which stands beside it where a round made it."""
    file = student / REPORT
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    report, _ = report_of(student / train.MODEL, lineage.seed.path, lineage.experiment)
    return asdict(report)


def _origin(copied: Sequence[int], number: int) -> str:
    """Say where a round's rows come from, by how many there are of each of its `_parts`."""
    gold, written, labelled = copied[0], sum(copied[1 : number + 1]), sum(copied[number + 1 :])
    rest = f", with {labelled} labelled by one" if labelled else ""
    return (
        f"{gold} texts labelled by people and {written} written by a language model "
        f"(PGKD: arXiv 2411.05045){rest}"
    )


def on_test(lineage: Lineage, student: Path) -> dict[str, Any] | None:
    """Score a student on the gold test rows; None where there are none."""
    experiment, corpus = lineage.experiment, lineage.corpus
    if not corpus.manifest().details["test"]:
        return None
    found = score_student(
        corpus.path / "test",
        student,
        label_names=experiment.task.label_names,
        section=experiment.evaluate,
        max_length=experiment.student.max_length,
        batch_size=experiment.train.scoring_batch_size,
        seed=experiment.seed,
    )
    tree: dict[str, Any] = found.model_dump()
    return tree
