"""Let the teacher label the corpus: a label and a calibrated confidence for every row."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def label(experiment: Experiment) -> None:
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.corpus.require()
    if lineage.labels.made:
        print(f"label: {lineage.labels.path} is there already")
        return
    if not lineage.readouts.made:
        read_out(experiment)
    calibrate(experiment)


def read_out(experiment: Experiment) -> None:
    """Ask the teacher: the expensive part, which goes on where a killed run stopped."""
    from dataclasses import asdict

    from llkd_ray.artifacts import Rows, make
    from llkd_ray.cluster import ray_session
    from llkd_ray.lineage import Lineage
    from llkd_ray.teacher import readouts
    from llkd_ray.teacher.pretrained import teacher_folder

    lineage = Lineage(experiment)
    model = teacher_folder(experiment.teacher.model, experiment.cache)
    with make(lineage.readouts, resume=True) as draft, ray_session(experiment.ray):
        answered = readouts.read_out(
            lineage.corpus.path.resolve(),
            draft.folder.resolve(),
            experiment.task,
            experiment.teacher,
            model,
        )
        kept = answered.taken - answered.rejected
        draft.rows = Rows(taken=answered.taken, kept=kept, rejected=answered.rejected)
        draft.details = asdict(answered)
    print(
        f"label: wrote {lineage.readouts.path}: {answered.answered_now} rows at "
        f"{answered.rows_per_s:.1f} rows/s, {answered.rejected} rejected"
    )


def calibrate(experiment: Experiment) -> None:
    """Turn the stored answers into labels: cheap, whenever the calibration changes."""
    from dataclasses import asdict

    from llkd_ray.artifacts import make
    from llkd_ray.lineage import Lineage
    from llkd_ray.teacher import label

    lineage = Lineage(experiment)
    with make(lineage.labels) as draft:
        labelled = label.label(
            lineage.corpus.path,
            lineage.readouts.path,
            draft.folder,
            experiment.calibration,
            experiment.task.label_names,
        )
        asked = lineage.readouts.manifest().rows
        draft.rows = asked
        draft.details = asdict(labelled)
    quality = (
        ""
        if labelled.accuracy is None
        else f", accuracy {labelled.accuracy:.3f} ({labelled.accuracy_uncalibrated:.3f} raw), "
        f"calibration error {labelled.ece:.3f}"
    )
    print(
        f"label: wrote {lineage.labels.path}: {labelled.unlabeled_rows} unlabeled rows, "
        f"{labelled.unlabeled_rejected} rejected{quality}"
    )


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), label))
