"""Train the student on the teacher's labels, and those it is compared with."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment, StudentSource

if TYPE_CHECKING:
    from llkd_ray.artifacts import Artifact


def train(experiment: Experiment) -> None:
    train_rules(experiment, [experiment.selection.rule, *experiment.evaluate.compare_rules])
    if experiment.serve.on_onnx:
        export(experiment, "trained")


def train_rules(experiment: Experiment, rules: Iterable[str]) -> None:
    """Train a student by each of the rules."""
    if experiment.train.lessons:
        mix(experiment)
    for rule in dict.fromkeys(rules):
        train_one(experiment, rule)


def mix(experiment: Experiment) -> None:
    """Put the rows that the teacher wrote for `guide` beside those that it labelled."""
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    artifact = lineage.mixture
    if artifact.made:
        print(f"train: {artifact} is there already")
        return

    from llkd_ray.artifacts import make
    from llkd_ray.guided.mixture import mix

    with make(artifact) as draft:
        draft.rows, draft.details = mix(lineage, draft.folder)
    print(f"train: wrote {artifact}: {_with_lessons(artifact)}")


def _with_lessons(mixture: "Artifact") -> str:
    """Say what rows a mixture is of."""
    *written, labelled = mixture.manifest().details["rows"].values()
    return (
        f"{labelled} texts labelled by a language model and {sum(written)} that it wrote itself "
        "for what a student got wrong on gold rows (PGKD: arXiv 2411.05045)"
    )


def train_one(experiment: Experiment, rule: str) -> None:
    """Train with one rule: the experiment's own settings of it, or its defaults."""
    from llkd_ray.config import rule_named
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.corpus.require()
    lineage.labelled.require()
    artifact = lineage.student(rule)
    if artifact.made:
        print(f"train: {artifact} is there already")
        return

    from llkd_ray.artifacts import make
    from llkd_ray.cluster import ray_session
    from llkd_ray.student import train

    with make(artifact, resume=True) as draft, ray_session(experiment.ray):
        trained = train.train(
            lineage.labelled.path,
            draft.folder,
            corpus=lineage.corpus.path,
            label_names=experiment.task.label_names,
            selection=rule_named(rule, experiment.selection),
            student=experiment.student,
            section=experiment.train,
            seed=experiment.seed,
            cache=experiment.cache,
            calibration=experiment.calibration.kind,
            origin=_with_lessons(lineage.mixture) if experiment.train.lessons else None,
        )
        draft.rows, draft.details = trained.rows, trained.details
    details = trained.details
    scores = (
        ""
        if details["validation_macro_f1"] is None
        else f", validation macro-F1 {details['validation_macro_f1']:.3f}"
    )
    print(
        f"train: wrote {artifact}: rule {rule}, {details['rows_used_fraction']:.0%} of "
        f"row-steps in {details['steps']} steps, epoch {details['best_epoch']} is best{scores}"
    )


def export(experiment: Experiment, source: StudentSource) -> None:
    """Turn a student into what ONNX Runtime serves on a CPU."""
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    artifact = lineage.onnx(source)
    if artifact.made:
        print(f"{artifact.job}: {artifact} is there already")
        return

    from llkd_ray.artifacts import make
    from llkd_ray.student.onnx import export_onnx
    from llkd_ray.student.train import MODEL

    with make(artifact) as draft:
        exported = export_onnx(
            lineage.source(source).path / MODEL,
            draft.folder / MODEL,
            corpus=lineage.corpus.path,
            section=experiment.export,
            max_length=experiment.student.max_length,
        )
        draft.rows, draft.details = exported.rows, exported.details
    print(f"{artifact.job}: wrote {artifact}: {exported.summary}")


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), train))
