"""Score teacher and students on the gold test rows; choose the cascade's threshold."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def evaluate(experiment: Experiment) -> None:
    score(experiment)
    if has_cascade(experiment):
        cascade(experiment)


def has_cascade(experiment: Experiment) -> bool:
    """Return whether there are rows to choose the cascade's threshold on, or one is wanted."""
    from llkd_ray.lineage import Lineage

    asked = "validation" in experiment.teacher.splits
    rows = Lineage(experiment).corpus.manifest().details["validation"]
    return (asked and rows > 0) or experiment.asks_for_cascade


def score(experiment: Experiment) -> None:
    """Score teacher and students."""
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.labels.require()
    students = {rule: artifact.require() for rule, artifact in lineage.students.items()}
    if lineage.scores.made:
        print(f"evaluate: {lineage.scores} is there already")
        return

    from llkd_ray.artifacts import make
    from llkd_ray.student.scores import score_models
    from llkd_ray.student.train import MODEL

    with make(lineage.scores) as draft:
        scored = score_models(
            lineage.labels.path / "test",
            {rule: artifact.path / MODEL for rule, artifact in students.items()},
            draft.folder,
            label_names=experiment.task.label_names,
            section=experiment.evaluate,
            max_length=experiment.student.max_length,
            batch_size=experiment.train.scoring_batch_size,
            seed=experiment.seed,
        )
        draft.rows = scored.rows
        draft.details = {
            name: {"accuracy": score.accuracy.value, "macro_f1": score.macro_f1.value}
            for name, score in scored.models.items()
        }
    accuracies = ", ".join(
        f"{name} {score.accuracy.value:.3f}" for name, score in scored.models.items()
    )
    print(
        f"evaluate: wrote {lineage.scores}: accuracy on {scored.rows.kept} gold test rows: "
        f"{accuracies}"
    )


def cascade(experiment: Experiment) -> None:
    """Choose where the student hands over to the teacher."""
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    artifact = lineage.cascade
    if artifact.made:
        print(f"evaluate: {artifact} is there already")
        return

    from llkd_ray.artifacts import make
    from llkd_ray.serving.teacher import served_calibration
    from llkd_ray.serving.tradeoff import measure
    from llkd_ray.student.train import MODEL

    labels = lineage.labels.require().path
    _, calibration = served_calibration(labels, experiment.calibration.kind)
    with make(artifact) as draft:
        measured = measure(
            labels,
            lineage.own.require().path / MODEL,
            draft.folder,
            label_names=experiment.task.label_names,
            calibration=calibration,
            target=experiment.cascade,
            section=experiment.evaluate,
            max_length=experiment.student.max_length,
            batch_size=experiment.train.scoring_batch_size,
            seed=experiment.seed,
        )
        draft.rows, draft.details = measured.rows, measured.summary.model_dump()
    found = measured.summary
    on = found.test or found.validation
    print(
        f"evaluate: wrote {artifact}: the cascade asks the teacher about "
        f"{on.teacher_fraction:.1%} of {on.rows} {'test' if found.test else 'validation'} rows: "
        f"accuracy {on.accuracy.value:.3f}, student alone {on.student.value:.3f}, teacher alone "
        f"{on.teacher.value:.3f}; {found.reason}"
    )


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), evaluate))
