"""Let the teacher label the corpus: a label and a calibrated confidence for every row."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment

# Fewer shards are calibrated before a Ray of their own would have started.
_SHARDS_FOR_RAY = 32
_EMBEDDED_SHARDS_FOR_RAY = 4


def label(experiment: Experiment) -> None:
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.corpus.require()
    if lineage.labels.made:
        print(f"label: {lineage.labels} is there already")
        return
    if not lineage.readouts.made:
        read_out(experiment)
    calibrate(experiment)


def read_out(experiment: Experiment) -> None:
    """Ask the teacher: the expensive part, which goes on where a killed run stopped."""
    from dataclasses import asdict

    from llkd_ray.artifacts import Rows, make
    from llkd_ray.cluster import ray_session, require_room
    from llkd_ray.lineage import Lineage
    from llkd_ray.teacher import readouts
    from llkd_ray.teacher.actor import Opening
    from llkd_ray.teacher.ledger import Ledger

    lineage = Lineage(experiment)
    opening = Opening.of(experiment)
    prompt = opening.prompt()
    if prompt is not None:
        print(f"label: {prompt.readout.why}")
    ledger = Ledger(lineage.ledger.resolve(), len(experiment.task.labels))
    ledger.open(lineage.asking)
    with make(lineage.readouts) as draft, ray_session(experiment.ray):
        actors = experiment.teacher.actors
        require_room(experiment.ray, actors.min, actors.num_cpus, opening.num_gpus)
        answered = readouts.read_out(
            lineage.corpus.path.resolve(), draft.folder.resolve(), opening, ledger
        )
        kept = answered.taken - answered.rejected
        draft.rows = Rows(taken=answered.taken, kept=kept, rejected=answered.rejected)
        draft.details = {**asdict(answered), "model": lineage.asking["model"]}
    # The first batch begins the measure, so one batch alone has no rate.
    rate = f" at {answered.rows_per_s:.1f} rows/s" if answered.rows_per_s else ""
    print(
        f"label: wrote {lineage.readouts}: asked about {answered.answered_now} rows{rate}, "
        f"{answered.rejected} of {answered.taken} rejected"
    )


def calibrate(experiment: Experiment) -> None:
    """Turn the stored answers into labels: cheap, whenever the calibration changes."""
    from dataclasses import asdict

    from llkd_ray.artifacts import Rows, make
    from llkd_ray.lineage import Lineage
    from llkd_ray.teacher import label

    lineage = Lineage(experiment)
    with make(lineage.labels) as draft, _shard_by_shard(experiment) as each:
        labelled = label.label(
            lineage.corpus.path,
            lineage.readouts.require().path,
            draft.folder,
            experiment.calibration,
            experiment.task.label_names,
            max_rejected_fraction=experiment.teacher.max_rejected_fraction,
            each=each,
        )
        taken = lineage.readouts.manifest().rows.taken
        draft.rows = Rows(taken=taken, kept=labelled.rows, rejected=labelled.rejected)
        draft.details = asdict(labelled)
    quality = (
        ""
        if labelled.accuracy is None
        else f", accuracy {labelled.accuracy:.3f} ({labelled.accuracy_uncalibrated:.3f} raw), "
        f"calibration error {labelled.ece:.3f}"
    )
    print(
        f"label: wrote {lineage.labels}: {labelled.unlabeled_rows} unlabeled rows, "
        f"{labelled.unlabeled_rejected} rejected{quality}"
    )


@contextlib.contextmanager
def _shard_by_shard(experiment: Experiment) -> Iterator[Any]:
    """Give a `map` over shards: Ray's tasks where there is much to do, else this process."""
    from llkd_ray.cluster import each, ray_session
    from llkd_ray.lineage import Lineage

    shards = len(list(Lineage(experiment).readouts.require().path.glob("*/shard-*.parquet")))
    embeds = experiment.calibration.kind == "stacked"
    if shards < (_EMBEDDED_SHARDS_FOR_RAY if embeds else _SHARDS_FOR_RAY):
        yield map
        return
    with ray_session(experiment.ray):
        yield functools.partial(each, num_cpus=1) if embeds else each


def print_plan(experiment: Experiment) -> None:
    """Print prompts, tokens, hours and cost; no weights are loaded."""
    from pathlib import Path

    from llkd_ray.lineage import Lineage
    from llkd_ray.teacher import readouts
    from llkd_ray.teacher.actor import Opening
    from llkd_ray.teacher.ledger import Ledger
    from llkd_ray.teacher.plan import describe, plan
    from llkd_ray.teacher.status import measured

    lineage = Lineage(experiment)
    if not lineage.corpus.made:
        print("no plan yet: run python jobs/prepare.py with this experiment first")
        return
    ledger = Ledger(lineage.ledger, len(experiment.task.labels))
    teacher = experiment.teacher
    shards = readouts.plan(lineage.corpus.path, Path(), teacher.splits, teacher.max_unlabeled_rows)
    done = sum(
        shard.take - readouts.count_unanswered(shard, ledger, teacher.attempts) for shard in shards
    )
    rate = measured(lineage.run, lineage.asking["model"])
    print(describe(plan(lineage.corpus.path, Opening.of(experiment), done, rate)))


def print_status(experiment: Experiment) -> None:
    """Print rows done, left and rejected; a running job is not disturbed."""
    from llkd_ray import storage
    from llkd_ray.lineage import Lineage
    from llkd_ray.teacher.ledger import Ledger
    from llkd_ray.teacher.status import status

    lineage = Lineage(experiment)
    lineage.corpus.require()
    ledger = Ledger(lineage.ledger, len(experiment.task.labels))
    print(storage.address(lineage.ledger))
    print(f"{'split':12}{'rows':>12}{'done':>12}{'rejected':>12}{'left':>12}")
    for split in status(lineage.corpus.path, experiment.teacher, ledger):
        print(
            f"{split.split:12}{split.rows:>12}{split.done:>12}{split.rejected:>12}{split.left:>12}"
        )
    for artifact in (lineage.readouts, lineage.labels):
        print(f"{artifact} {'is there' if artifact.made else 'is not made yet'}")


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), label, dry_run=print_plan, status=print_status))
