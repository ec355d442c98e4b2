"""Which artifacts an experiment's stages read and make, before any of them is run.

Fingerprints follow from the experiment and the identity of its inputs alone, so a job can say
whether its input is there, and whether its output is still true, in a moment.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llkd_ray import embedded, sources
from llkd_ray.artifacts import Artifact
from llkd_ray.config import Experiment, as_tree, rule_named


class Lineage:
    """The artifacts of one experiment.

    Each property names an artifact; whether it is made is the artifact's to say. The settings in a
    fingerprint are those that decide the content: numbers of actors, threads or prices do not.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.run = Path(experiment.runs).expanduser() / experiment.name

    @cached_property
    def corpus(self) -> Artifact:
        """Split, de-duplicated texts."""
        experiment = self.experiment
        return self._artifact(
            "corpus",
            "prepare",
            {
                "corpus": as_tree(experiment.corpus),
                "source": sources.identity(experiment.corpus),
                "labels": as_tree(experiment.task)["labels"],
                "examples": [example.text for example in experiment.task.examples],
            },
        )

    @cached_property
    def readouts(self) -> Artifact:
        """The teacher's raw log-probabilities: the expensive part, never made twice."""
        teacher = as_tree(self.experiment.teacher)
        engine = {key: teacher["engine"][key] for key in ("dtype", "max_model_len", "quantization")}
        return self._artifact(
            "readouts",
            "label",
            {
                "task": as_tree(self.experiment.task),
                "model": embedded.revision(self.experiment.teacher.model),
                "splits": teacher["splits"],
                "max_unlabeled_rows": teacher["max_unlabeled_rows"],
                "engine": engine,
                "max_rejected_fraction": teacher["max_rejected_fraction"],
            },
            self.corpus,
        )

    @cached_property
    def labels(self) -> Artifact:
        """Texts with the teacher's calibrated label and confidence."""
        return self._artifact(
            "labels", "label", as_tree(self.experiment.calibration), self.corpus, self.readouts
        )

    def student(self, rule: str | None = None) -> Artifact:
        """Name the student trained with a rule, the experiment's own when not given."""
        experiment = self.experiment
        selection = rule_named(rule or experiment.selection.rule, experiment.selection)
        train = dict(as_tree(experiment.train))
        for key in ("max_failures", "cpus_per_worker", "threads_per_worker"):
            del train[key]
        return self._artifact(
            "student",
            "train",
            {
                "selection": as_tree(selection),
                "student": as_tree(experiment.student),
                "model": embedded.revision(experiment.student.model),
                "train": train,
                "seed": experiment.seed,
            },
            self.labels,
        )

    @property
    def students(self) -> dict[str, Artifact]:
        """The experiment's own student first, then those it is compared with, by rule."""
        own = self.experiment.selection.rule
        rules = dict.fromkeys([own, *self.experiment.evaluate.compare_rules])
        return {rule: self.student(rule) for rule in rules}

    @cached_property
    def scores(self) -> Artifact:
        """Teacher and students on the gold test rows."""
        return self._artifact(
            "scores",
            "evaluate",
            {**as_tree(self.experiment.evaluate), "seed": self.experiment.seed},
            self.labels,
            *self.students.values(),
        )

    @cached_property
    def bench(self) -> Artifact:
        """Latency, throughput and cost of the two endpoints."""
        experiment = self.experiment
        return self._artifact(
            "bench",
            "bench",
            {
                "bench": as_tree(experiment.bench),
                "serve": as_tree(experiment.serve),
                "engine": as_tree(experiment.teacher.engine),
                "threads": experiment.teacher.actors.threads,
            },
            self.labels,
            self.student(),
        )

    def _artifact(
        self, noun: str, job: str, settings: Mapping[str, Any], *inputs: Artifact
    ) -> Artifact:
        names = [f"{item.noun}" for item in inputs]
        keys = [
            name if names.count(name) == 1 else f"{name}.{position}"
            for position, name in enumerate(names)
        ]
        return Artifact(
            run=self.run,
            noun=noun,
            job=job,
            settings={"format": 1, **settings},
            inputs={key: item.fingerprint for key, item in zip(keys, inputs, strict=True)},
        )
