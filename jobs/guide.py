"""Have the teacher write rows for what the student gets wrong, round by round."""

import sys

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def guide(experiment: Experiment) -> None:
    import train

    go_through_rounds(experiment)
    if experiment.serve.on_onnx:
        train.export(experiment, "guided")


def go_through_rounds(experiment: Experiment) -> None:
    """Have rows written and students trained until they get no better."""
    import train

    from llkd_ray.config import with_overrides
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    lineage.corpus.require()
    artifact = lineage.guided
    if artifact.made:
        print(f"guide: {artifact} is there already")
        return

    from llkd_ray.artifacts import make
    from llkd_ray.cluster import ray_session, require_room
    from llkd_ray.guided.rounds import guide as run
    from llkd_ray.teacher.actor import Opening

    with make(artifact) as draft, ray_session(experiment.ray):
        actors, num_gpus = experiment.teacher.actors, Opening.of(experiment).num_gpus
        require_room(experiment.ray, actors.min, actors.num_cpus, num_gpus)
        if experiment.guide.start == "student":
            # Of the labels alone: what is written follows from it.
            alone = with_overrides(experiment, ["train.lessons=false"])
            train.train_one(alone, experiment.selection.rule)
        draft.rows, draft.details = run(lineage, draft.folder)
    details, test = draft.details, draft.details["test"]
    scores = f", test accuracy {test['accuracy']['value']:.3f}" if test else ""
    print(
        f"guide: wrote {artifact}: round {details['best_round']} of {details['rounds']} has "
        f"the lowest validation loss, {details['validation_loss']:.3f}; {draft.rows.kept} of "
        f"{draft.rows.taken} texts were kept{scores}"
    )


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), guide))
