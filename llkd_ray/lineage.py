"""Which artifacts an experiment's stages read and make, before any of them is run.

Fingerprints follow from the experiment and the identity of its inputs alone, so a job can say
whether its input is there, and whether its output is still true, in a moment.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llkd_ray import sources, storage
from llkd_ray.artifacts import Artifact, fingerprint
from llkd_ray.config import (
    Experiment,
    HTTPTeacher,
    ScriptedTeacher,
    StudentSource,
    VLLMTeacher,
    as_tree,
    rule_named,
)
from llkd_ray.digests import revision


class Lineage:
    """The artifacts of one experiment.

    Each property names an artifact; whether it is made is the artifact's to say. The settings in a
    fingerprint are those that decide the content: numbers of actors, threads or prices do not.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.run = storage.folder_of(experiment.runs, experiment.cache) / experiment.name

    @cached_property
    def corpus(self) -> Artifact:
        """Split, de-duplicated texts."""
        experiment = self.experiment
        return self._artifact(
            "corpus",
            "prepare",
            {
                "corpus": _without(experiment.corpus, "source"),
                "source": sources.identity(experiment.corpus, self._cache),
                "labels": [
                    {"name": label.name, "gold": list(label.gold)}
                    for label in experiment.task.labels
                ],
                "examples": [example.text for example in experiment.task.examples],
                "pool": self._pool,
            },
        )

    @cached_property
    def asking(self) -> Mapping[str, Any]:
        """All that decides what the teacher answers about a text, the text aside."""
        experiment = self.experiment
        task = as_tree(experiment.task)
        teacher = experiment.teacher
        told = {
            "instruction": task["instruction"],
            "text_prefix": task["text_prefix"],
            "label_prefix": task["label_prefix"],
            "labels": [
                {key: label[key] for key in ("name", "words", "description")}
                for label in task["labels"]
            ],
            "examples": task["examples"],
            "pool": [] if teacher.shots.kind == "fixed" else self._pool,
        }
        match teacher:
            case VLLMTeacher(engine=engine):
                decoding = _only(engine, "dtype", "max_model_len", "quantization", "block_size")
            case HTTPTeacher():
                decoding = _only(teacher, "url", "api", "top_logprobs", "votes", "vote_temperature")
            case ScriptedTeacher():
                decoding = {}
        shots = dict(as_tree(teacher.shots))
        if teacher.shots.kind == "nearest":
            shots["encoder"] = revision(teacher.shots.encoder, self._cache)
        return {
            # Raised when the same settings come to make another prompt or read-out.
            "format": 1,
            "task": told,
            "kind": teacher.kind,
            "model": revision(teacher.model, self._cache),
            "readout": teacher.readout,
            "prompt": as_tree(teacher.prompt),
            "shots": shots,
            "decoding": decoding,
        }

    @property
    def ledger(self) -> Path:
        """Folder of the answers that were ever given to this way of asking."""
        return self.run / f"ledger-{fingerprint(self.asking)}"

    @cached_property
    def readouts(self) -> Artifact:
        """The teacher's raw log-probabilities about this corpus."""
        asked = _only(
            self.experiment.teacher,
            "splits",
            "max_unlabeled_rows",
            "attempts",
            "max_rejected_fraction",
        )
        return self._artifact(
            "readouts",
            "label",
            {"asking": fingerprint(self.asking), **asked},
            self.corpus,
        )

    @cached_property
    def labels(self) -> Artifact:
        """Texts with the teacher's calibrated label and confidence."""
        calibration = self.experiment.calibration
        settings = dict(as_tree(calibration))
        encoder = settings.pop("encoder")
        if calibration.kind == "stacked":
            settings["encoder"] = revision(encoder, self._cache)
        return self._artifact("labels", "label", settings, self.corpus, self.readouts)

    @cached_property
    def comparison(self) -> Artifact:
        """Many ways of training, side by side on the gold test rows."""
        experiment = self.experiment
        of_student = self._training(experiment.selection.rule)
        return self._artifact(
            "comparison",
            "compare",
            {
                **of_student,
                "compare": as_tree(experiment.compare),
                "evaluate": _only(experiment.evaluate, "bootstrap_resamples"),
            },
            self.corpus,
            self.labelled,
        )

    @property
    def labelled(self) -> Artifact:
        """The rows that students are trained on."""
        return self.mixture if self.experiment.train.lessons else self.labels

    @cached_property
    def mixture(self) -> Artifact:
        """The rows that the teacher labelled and those that it wrote."""
        return self._artifact("mixture", "train", {}, self.labels, self.guided)

    def student(self, rule: str | None = None, *, rows: Artifact | None = None) -> Artifact:
        """Name the student trained with a rule on rows, the experiment's own when not given."""
        # Its confidence is calibrated; students of before that have other names.
        settings = {
            **self._training(rule or self.experiment.selection.rule),
            "confidence": "temperature",
        }
        return self._artifact("student", "train", settings, rows or self.labelled)

    def _training(self, rule: str) -> dict[str, Any]:
        """Return what decides a student's weights, the labels aside."""
        experiment = self.experiment
        train = _without(
            experiment.train,
            *("max_failures", "cpus_per_worker", "threads_per_worker", "checkpoint_steps"),
            "lessons",
        )
        return {
            "selection": as_tree(rule_named(rule, experiment.selection)),
            "student": as_tree(experiment.student),
            "model": revision(experiment.student.model, self._cache),
            "train": {**train, "deepspeed": _content(experiment.train.deepspeed)},
            "seed": experiment.seed,
        }

    @cached_property
    def seed(self) -> Artifact:
        """Gold rows that a guided distillation starts from."""
        settings = _only(self.experiment.guide, "start", "seed_rows", "validation_fraction")
        return self._artifact("seed", "guide", settings, self.corpus)

    def lessons(self, number: int) -> Artifact:
        """Name the rows that the teacher writes in a round, from 1."""
        guide = self.experiment.guide
        decide = _only(
            guide,
            *("samples", "samples_per_prompt", "weakness", "report_tokens"),
            *("shown", "sampling", "checks"),
        )
        settings = {
            # Format 2: what the student is sure of, but takes for another label, is kept.
            "format": 2,
            "number": number,
            "asking": fingerprint(self.asking),
            "seed": self.experiment.seed,
            **decide,
        }
        return self._artifact("lessons", "guide", settings, self.seed, self.round(number - 1))

    def round(self, number: int) -> Artifact:
        """Name the student of a round, trained on the seed and the rows of all rounds up to it.

        With `guide.start` = "student", on the teacher's labels, too; and round 0 is that student.
        """
        if number == 0 and self.experiment.guide.start == "student":
            # Of the labels alone, or the rows written would follow from themselves.
            return self.student(rows=self.labels)
        guide = self.experiment.guide
        goes_on = {"weights": guide.weights} if number and guide.weights != "fresh" else {}
        return self._artifact(
            "round",
            "guide",
            # Format 2: validation loss is that of before the temperature.
            {"format": 2, "number": number, **self._training(guide.rule), **goes_on},
            self.seed,
            # Those of the rounds before follow from these.
            *([self.lessons(number)] if number else []),
        )

    @cached_property
    def guided(self) -> Artifact:
        """The student of the best round."""
        experiment = self.experiment
        return self._artifact(
            "guided",
            "guide",
            {
                **_only(experiment.guide, "rounds", "patience"),
                "evaluate": _only(experiment.evaluate, "bootstrap_resamples", "calibration_bins"),
            },
            # All others follow from it, and from the settings that it follows from.
            self.round(1),
        )

    @property
    def own(self) -> Artifact:
        """The experiment's own student, by `serve.student`."""
        return self.source(self.experiment.serve.student)

    def source(self, source: StudentSource) -> Artifact:
        """Name the student that one of the two jobs makes."""
        return self.guided if source == "guided" else self.student()

    @property
    def students(self) -> dict[str, Artifact]:
        """The experiment's own student first, then those it is compared with, by rule."""
        own, compared = self.experiment.own_student, self.experiment.evaluate.compare_rules
        return {own: self.own, **{rule: self.student(rule) for rule in compared if rule != own}}

    def onnx(self, source: StudentSource) -> Artifact:
        """Name a student for ONNX Runtime."""
        experiment = self.experiment
        student = self.source(source)
        return self._artifact(
            "onnx",
            student.job,
            {"export": as_tree(experiment.export), **_only(experiment.student, "max_length")},
            self.corpus,
            student,
        )

    @property
    def served(self) -> Artifact:
        """The experiment's own student in the form in which it is served."""
        serve = self.experiment.serve
        return self.onnx(serve.student) if serve.on_onnx else self.own

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
    def cascade(self) -> Artifact:
        """Where the student hands over to the teacher, and what that wins and costs."""
        experiment = self.experiment
        return self._artifact(
            "cascade",
            "evaluate",
            {
                **_only(experiment.cascade, "accuracy", "max_teacher_fraction", "abstain_below"),
                **_only(experiment.evaluate, "bootstrap_resamples"),
                "seed": experiment.seed,
            },
            self.labels,
            self.own,
        )

    @cached_property
    def bench(self) -> Artifact:
        """Latency, throughput and cost of the endpoints."""
        experiment = self.experiment
        with_cascade = "cascade" in experiment.bench.targets
        return self._artifact(
            "bench",
            "bench",
            {
                "bench": as_tree(experiment.bench),
                "serve": as_tree(experiment.serve),
                "teacher": self._serving_teacher,
                **({"cascade": as_tree(experiment.cascade)} if with_cascade else {}),
            },
            self.labels,
            self.served,
            *([self.cascade] if with_cascade else []),
        )

    @property
    def main_line(self) -> list[Artifact]:
        """What the experiment comes to from end to end, in the order of making."""
        experiment = self.experiment
        guides = experiment.serve.student == "guided" or experiment.train.lessons
        return _distinct(
            [
                *(self.corpus, self.readouts, self.labels),
                *([self.guided] if guides else []),
                *(self.labelled, *self.students.values(), self.served),
                *([self.cascade] if experiment.asks_for_cascade else []),
                *(self.scores, self.bench),
            ]
        )

    @property
    def artifacts(self) -> list[Artifact]:
        """Everything that any job makes of this experiment, in an order of making."""
        exports = [self.onnx("trained"), self.onnx("guided")]
        return _distinct(
            [
                *(self.corpus, self.readouts, self.labels, self.seed, *self._rounds(), self.guided),
                *(self.labelled, self.student(), *self.students.values(), *exports),
                *(self.cascade, self.scores, self.bench, self.comparison),
            ]
        )

    def _rounds(self) -> Iterator[Artifact]:
        yield self.round(0)
        for number in range(1, self.experiment.guide.rounds + 1):
            yield self.lessons(number)
            yield self.round(number)

    @property
    def _serving_teacher(self) -> Mapping[str, Any]:
        """What decides the speed of the teacher when it is served."""
        teacher = self.experiment.teacher
        if not isinstance(teacher, VLLMTeacher):
            return {}
        return {"engine": as_tree(teacher.engine), "threads": teacher.actors.threads}

    @cached_property
    def _pool(self) -> list[Any]:
        """Name the exact content of the gold pool."""
        task, corpus = self.experiment.task, self.experiment.corpus
        if task.examples_source is None:
            return []
        read = _only(corpus, "text_column", "gold_column", "max_text_chars")
        gold = [[label.name, *label.gold] for label in task.labels]
        source = sources.identity(corpus, self._cache, task.examples_source)
        return [*source, task.max_examples, read, gold]

    @property
    def _cache(self) -> Path:
        return Path(self.experiment.cache).expanduser()

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


def _distinct(artifacts: list[Artifact]) -> list[Artifact]:
    """Leave out those that were named before."""
    return list({artifact.path: artifact for artifact in artifacts}.values())


def _only(section: BaseModel, *keys: str) -> dict[str, Any]:
    """Return some keys of a section."""
    tree = as_tree(section)
    return {key: tree[key] for key in keys}


def _without(section: BaseModel, *keys: str) -> dict[str, Any]:
    """Return a section but for some keys."""
    return {key: value for key, value in as_tree(section).items() if key not in keys}


def _content(file: str | None) -> str | None:
    """Return what a settings file says; nothing for one that is missing, which its job reports."""
    path = None if file is None else Path(file).expanduser()
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None
