"""Run the whole flow: prepare, label, train, evaluate, bench, report; what is made is kept."""

import os
import sys
import time

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment


def run(experiment: Experiment) -> None:
    import bench
    import evaluate
    import guide
    import label
    import prepare
    import report
    import train

    from llkd_ray import storage
    from llkd_ray.cluster import ray_session
    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.ingress import environment_of

    started = time.perf_counter()
    lineage = Lineage(experiment)
    prepare.prepare(experiment)
    has_gold = lineage.corpus.manifest().details["test"] > 0
    artifacts = [lineage.labels, *lineage.students.values(), lineage.served, lineage.bench]
    if has_gold:
        artifacts.append(lineage.scores)
        if evaluate.has_cascade(experiment):
            artifacts.append(lineage.cascade)
    if not all(artifact.made for artifact in artifacts):
        os.environ.update(environment_of(experiment.serve))  # Ray's processes inherit it.
        # One Ray for all stages; a stage by itself would start its own.
        with ray_session(experiment.ray):
            label.label(experiment)
            if experiment.serve.student == "guided" or experiment.train.lessons:
                guide.guide(experiment)
            if experiment.serve.student == "trained":
                train.train(experiment)
            else:
                train.train_rules(experiment, experiment.evaluate.compare_rules)
            if has_gold:
                evaluate.evaluate(experiment)
            bench.bench(experiment)
    if not has_gold:
        print("evaluate: nothing to score against, the corpus has no gold test rows")
    report.report(experiment)
    seconds = time.perf_counter() - started
    print(f"run: {storage.address(lineage.run)} is complete after {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), run))
