"""Score teacher and students on the gold test rows."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def evaluate(experiment: Experiment) -> None:
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.labels.require()
    students = {rule: artifact.require() for rule, artifact in lineage.students.items()}
    if lineage.scores.made:
        print(f"evaluate: {lineage.scores.path} is there already")
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
        f"evaluate: wrote {lineage.scores.path}: accuracy on {scored.rows.kept} gold test rows: "
        f"{accuracies}"
    )


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), evaluate))
