"""Train a student on the teacher's labels and leave the best epoch as a plain model."""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from llkd_ray import embedded, schema, storage
from llkd_ray.artifacts import Rows
from llkd_ray.config import Rule, StaticStudent, StudentSection, TrainSection
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ConfigError, StudentError
from llkd_ray.student.checkpoint import STUDENT, Progress, read_progress
from llkd_ray.student.engine import read_expert_settings
from llkd_ray.student.export import Card, export
from llkd_ray.student.fit import RUN, SIGNALS, fit
from llkd_ray.student.model import check_student
from llkd_ray.student.static import distilled
from llkd_ray.student.stopping import criterion
from llkd_ray.student.temperature import find_temperature, set_temperature
from llkd_ray.student.worker import Work
from llkd_ray.teacher.pretrained import is_on_hub

_log = logging.getLogger(__name__)
# Of Ray Train: its list of checkpoints.
_SNAPSHOT = "*snapshot*.json"
MODEL = "model"
"""Folder of the exported student inside its artifact."""
AUDIT, EPOCHS = "audit.parquet", "epochs.parquet"
"""Beside it: what each epoch kept, and what it came to."""
UNTRAINED = "untrained"
"""Folder of what a static student starts from, in the artifact while it is made."""


@dataclass(frozen=True)
class Trained:
    """What a training run was, for the manifest."""

    rows: Rows
    """Labelled rows in the shards, all of which were loaded."""
    details: dict[str, Any]
    """steps, epochs, row_steps, rows_used_fraction (row-steps over rows times epochs),
    distinct_rows, chosen_by, best_epoch, validation_accuracy, validation_macro_f1 and
    held_out_macro_f1 of that epoch, temperature (of the exported student: value, fitted_on,
    rows), seconds of this call."""


def train(
    labels: Path,
    out: Path,
    *,
    corpus: Path,
    label_names: tuple[str, ...],
    selection: Rule,
    student: StudentSection,
    section: TrainSection,
    seed: int,
    cache: str,
    calibration: str = "batch",
    origin: str | None = None,
    start: Path | None = None,
) -> Trained:
    """Train a student on the teacher's labels and leave the best epoch as a plain model.

    Needs a connection to Ray. A run that was killed goes on from its last checkpoint when called
    again with the same `out`.

    Reads:
        labels/unlabeled/shard-*.parquet (schema.labels) and, to choose the best epoch where
        there is gold and to calibrate, corpus/validation/shard-*.parquet (schema.TEXT).

    Writes:
        out/model (Hugging Face folder with model card), out/audit.parquet (schema.AUDIT),
        out/epochs.parquet (schema.EPOCHS), out/signals/*.parquet (schema.SIGNALS).

    Args:
        labels: Folder of the labels artifact.
        out: Folder of the student artifact in the making; on more than one machine, shared.
        corpus: Folder of the corpus artifact.
        label_names: The C classes.
        selection: The rule that chooses rows.
        student: Which kind of student, of which encoder.
        section: How to train.
        seed: Of head, order and dropout.
        cache: Folder for converted models.
        calibration: Kind of the labels' calibration, for the model card.
        origin: What the model card says of the labels instead, where a teacher alone did not give
            them.
        start: Folder of a trained student to go on from, in place of an encoder; on more than one
            machine, shared.

    Raises:
        ConfigError: The experiment wants gold where there is none, or patience where nothing is
            scored, or `train.deepspeed` is wrong.
        StudentError: The encoder cannot be loaded, there is no row to train on, or the loss is no
            number any more.
        ClusterError: Workers found no room, or died more often than `train.max_failures`.
    """
    started = time.perf_counter()
    check_student(student)
    folder = labels / "unlabeled"
    num_rows = count_rows(folder)
    if not num_rows:
        raise StudentError(f"{folder}: no labelled row to train on; run python jobs/label.py first")
    validation = corpus / "validation"
    has_gold = count_rows(validation, with_gold=True) > 0
    _check_criterion(section, has_gold=has_gold)
    work = Work(
        labels=folder.resolve(),
        validation=validation.resolve() if has_gold else None,
        label_names=label_names,
        selection=selection,
        student=found_from_anywhere(student, cache, out / UNTRAINED),
        train=section,
        expert=read_expert_settings(section),
        seed=seed,
        start=start.resolve() if start else None,
    )
    drop_broken_run(out / RUN)
    last, best = fit(work, out)
    progress, best_epoch = read_progress(last), read_progress(best).epoch
    # Where the run is in a store, nothing but the workers has seen the student yet.
    as_trained = storage.here(best / STUDENT)
    temperature = find_temperature(
        as_trained,
        corpus,
        labels,
        label_names,
        max_length=student.max_length,
        batch_size=section.scoring_batch_size,
        held_out_fraction=section.stopping.held_out_fraction,
        seed=seed,
    )
    details = {
        **_details(progress, best_epoch),
        "chosen_by": criterion(section.stopping, has_gold=has_gold),
        "temperature": asdict(temperature),
    }
    pq.write_table(pa.Table.from_pylist(list(progress.audit), schema.AUDIT), out / AUDIT)
    pq.write_table(pa.Table.from_pylist(list(progress.epochs), schema.EPOCHS), out / EPOCHS)
    card = Card(
        student=student.summary,
        label_names=label_names,
        max_length=student.max_length,
        rows=num_rows,
        rule=selection.rule,
        epochs=progress.epoch,
        details=details,
        calibration=calibration,
        temperature=temperature,
        origin=origin,
    )
    export(as_trained, out / MODEL, card)
    set_temperature(out / MODEL, temperature)
    storage.here(out / SIGNALS)
    _forget(out / RUN)
    storage.remove(out / UNTRAINED)
    trained_on = progress.epochs[-1]["rows"]
    assert trained_on == num_rows or section.stopping.held_out_fraction, "rows got lost"
    seconds = round(time.perf_counter() - started, 3)
    return Trained(
        rows=Rows(taken=num_rows, kept=num_rows, rejected=0),
        details={**details, "seconds": seconds},
    )


def found_from_anywhere(student: StudentSection, cache: str, shared: Path) -> StudentSection:
    """Name the student's folder so that every worker finds it, on this machine or another.

    Args:
        student: Which student.
        cache: Folder for converted models, this machine's own.
        shared: Folder that every machine sees; a static student's vectors are laid into it.
    """
    if isinstance(student, StaticStudent):
        vectors = distilled(student, cache)
        folder = shutil.copytree(vectors, shared / vectors.name, dirs_exist_ok=True)
        storage.put(folder)
    elif student.model in embedded.STUDENTS or is_on_hub(student.model):
        return student  # Every machine has it, or brings it for itself.
    else:
        folder = Path(student.model).expanduser()
    # Ray Train's workers run in folders of their own.
    return student.model_copy(update={"model": str(folder.resolve())})


def _forget(run: Path) -> None:
    """Remove what Ray Train left, first its list of checkpoints: one of lost ones is refused."""
    for name in storage.names(run):
        if fnmatch(name, _SNAPSHOT):
            storage.remove(run / name)
    storage.remove(run)


def drop_broken_run(run: Path) -> None:
    """Remove a run whose list of checkpoints a kill left half-written: Ray Train refuses it."""
    for snapshot in run.glob(_SNAPSHOT):
        try:
            json.loads(snapshot.read_text(encoding="utf-8"))
        except ValueError:
            _log.warning("%s: half-written; training starts over", snapshot)
            shutil.rmtree(run)
            return


def _check_criterion(section: TrainSection, *, has_gold: bool) -> None:
    by = section.stopping.choose_by
    if by == "gold" and not has_gold:
        raise ConfigError(
            "train.stopping.choose_by = 'gold': the validation split has no gold; name the column "
            "of human labels in corpus.gold_column, or choose by 'teacher'"
        )
    if by == "teacher" and not section.stopping.held_out_fraction:
        raise ConfigError(
            "train.stopping.choose_by = 'teacher' needs rows held out of training; set "
            "train.stopping.held_out_fraction, e.g. 0.1"
        )
    if section.stopping.patience is not None and (
        criterion(section.stopping, has_gold=has_gold) == "last"
    ):
        raise ConfigError(
            f"train.stopping.patience = {section.stopping.patience}: nothing is scored after an "
            "epoch, so nothing can stop rising; give the validation split gold, or set "
            "train.stopping.held_out_fraction, e.g. 0.1, and leave choose_by at 'auto'"
        )


def _details(progress: Progress, best_epoch: int) -> dict[str, Any]:
    best = progress.epochs[best_epoch - 1]
    return {
        "steps": progress.steps,
        "epochs": progress.epoch,
        "row_steps": progress.row_steps,
        "rows_used_fraction": progress.row_steps / sum(row["rows"] for row in progress.epochs),
        "distinct_rows": progress.epochs[-1]["distinct_rows"],
        "best_epoch": best_epoch,
        "validation_accuracy": best["validation_accuracy"],
        "validation_macro_f1": best["validation_macro_f1"],
        "held_out_macro_f1": best["held_out_macro_f1"],
    }


def count_rows(folder: Path, *, with_gold: bool = False) -> int:
    """Count the rows of a folder of shards, or those with gold."""
    files = [str(path) for path in read_shards(folder)]
    if not files:
        return 0
    condition = ds.field("gold").is_valid() if with_gold else None
    return int(ds.dataset(files).count_rows(filter=condition))
