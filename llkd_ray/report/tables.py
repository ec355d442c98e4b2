"""What the artifacts of a run hold, read once for the summary, the plots and the page."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from llkd_ray.artifacts import Artifact, Manifest
from llkd_ray.config import Experiment
from llkd_ray.errors import ArtifactError
from llkd_ray.lineage import Lineage
from llkd_ray.metrics import Quality, ReliabilityBin
from llkd_ray.schema import BenchSummary, CascadeSummary, ModelScore

_MISTAKES_SHOWN = 12
_REASONS_SHOWN = 8
_SCORES = TypeAdapter(dict[str, ModelScore])
_QUALITY = TypeAdapter(dict[str, dict[str, Quality]])


@dataclass(frozen=True)
class ClassCount:
    """One class in the unlabeled split."""

    label: str
    labelled: int
    """Rows the teacher gave this label."""
    gold: int | None
    """Rows the human gave it; None without gold."""
    right: float | None
    """Share of the teacher's rows that gold agrees with; None without gold."""


@dataclass(frozen=True)
class LabelTables:
    """The teacher's labels, and on the gold test rows how right it is when it is how sure."""

    calibration: str
    """The chosen one."""
    rejected: dict[str, int]
    """Reasons for which rows of any split got no label, most frequent first, and their rows."""
    classes: list[ClassCount]
    quality: dict[str, Quality]
    """By calibration, those that could be fitted; nothing without gold test rows."""
    bins: dict[str, list[ReliabilityBin]]
    """By calibration, equally wide ranges of confidence."""
    deciles: dict[str, list[ReliabilityBin]]
    """By calibration, equally many rows each."""


@dataclass(frozen=True)
class StudentTables:
    """What training one rule left."""

    manifest: Manifest
    audit: pa.Table
    epochs: pa.Table

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights are the student, from 1."""
        return int(self.manifest.details["best_epoch"])


@dataclass(frozen=True)
class Mistake:
    """A test row that the student got wrong."""

    text: str
    gold: str
    student: str
    confidence: float
    """The student's probability of its answer."""
    teacher: str | None
    """The teacher's label; None where the teacher gave none."""


@dataclass(frozen=True)
class ScoreTables:
    """Teacher and students on the gold test rows."""

    models: dict[str, ModelScore]
    mistakes: list[Mistake]


@dataclass(frozen=True)
class BenchTables:
    """The endpoints, measured from outside."""

    summary: BenchSummary
    machine: dict[str, Any]


@dataclass(frozen=True)
class CascadeTables:
    """Student and teacher together."""

    summary: CascadeSummary
    curve: pa.Table


@dataclass(frozen=True)
class RunTables:
    """A run as far as it has been made."""

    experiment: Experiment
    manifests: dict[str, Manifest]
    """Of the made artifacts, in the order of the stages; compared students as `student (RULE)`."""
    missing: dict[str, str]
    """For each artifact that is not made, a sentence with the job that makes it."""
    rejected: dict[str, int]
    """Reasons for which corpus rows were kept aside, most frequent first, and their rows."""
    labels: LabelTables | None
    students: dict[str, StudentTables]
    """By rule, the experiment's own first; a guided one is called `guided`."""
    scores: ScoreTables | None
    cascade: CascadeTables | None
    """None as well where the teacher was not asked about validation rows."""
    bench: BenchTables | None


def read_run(lineage: Lineage) -> RunTables:
    """Read whatever this experiment's stages have left.

    Raises:
        ArtifactError: Not even the corpus is made.
    """
    lineage.corpus.require()
    artifacts = dict(_named(lineage))
    made = {name: artifact for name, artifact in artifacts.items() if artifact.made}
    return RunTables(
        experiment=lineage.experiment,
        manifests={name: artifact.manifest() for name, artifact in made.items()},
        missing={
            name: _remedy(artifact) for name, artifact in artifacts.items() if name not in made
        },
        rejected=_rejected(lineage.corpus),
        labels=_labels(lineage) if lineage.labels.made else None,
        students={
            rule: StudentTables(
                manifest=artifact.manifest(),
                audit=pq.read_table(artifact.path / "audit.parquet"),
                epochs=pq.read_table(artifact.path / "epochs.parquet"),
            )
            for rule, artifact in lineage.students.items()
            if artifact.made and artifact.require()
        },
        scores=_scores(lineage) if lineage.scores.made else None,
        cascade=_cascade(lineage.cascade) if lineage.cascade.made else None,
        bench=_bench(lineage.bench) if lineage.bench.made else None,
    )


def _named(lineage: Lineage) -> Iterator[tuple[str, Artifact]]:
    yield "corpus", lineage.corpus
    yield "readouts", lineage.readouts
    yield "labels", lineage.labels
    if lineage.experiment.train.lessons:
        yield "mixture", lineage.mixture
    for rule, artifact in lineage.students.items():
        own = rule == lineage.experiment.own_student
        yield artifact.noun if own else f"student ({rule})", artifact
    yield "scores", lineage.scores
    if "validation" in lineage.experiment.teacher.splits:
        yield "cascade", lineage.cascade
    yield "bench", lineage.bench


def _remedy(artifact: Artifact) -> str:
    """Return the sentence with which the artifact itself says that it is not there."""
    try:
        artifact.require()
    except ArtifactError as error:
        return str(error)
    raise AssertionError(f"{artifact.path} appeared while the report was made")


def _rejected(corpus: Artifact) -> dict[str, int]:
    file = corpus.path / "rejected.parquet"
    if not file.exists():
        return {}
    counts = pq.read_table(file, columns=["reason"])["reason"].value_counts().to_pylist()
    counts.sort(key=lambda count: (-count["counts"], count["values"]))
    return {count["values"]: count["counts"] for count in counts[:_REASONS_SHOWN]}


def _labels(lineage: Lineage) -> LabelTables:
    details = lineage.labels.require().manifest().details
    rejected = Counter[str]()
    for split in details["splits"].values():
        rejected.update(split["reasons"])
    quality = _QUALITY.validate_python(details["quality"])
    on_test = {kind: splits["test"] for kind, splits in quality.items() if "test" in splits}
    table = pq.read_table(lineage.labels.path / "reliability.parquet")
    bins = {
        name: {kind: _bins(table, kind, name) for kind in on_test} for name in ("bin", "decile")
    }
    return LabelTables(
        calibration=lineage.experiment.calibration.kind,
        rejected=dict(rejected.most_common(_REASONS_SHOWN)),
        classes=_classes(lineage),
        quality=on_test,
        bins=bins["bin"],
        deciles=bins["decile"],
    )


def _bins(table: pa.Table, calibration: str, name: str) -> list[ReliabilityBin]:
    """Return one table of a calibration on the test rows, the least confident rows first."""
    chosen = (
        (pc.field("calibration") == calibration)
        & (pc.field("split") == "test")
        & (pc.field("table") == name)
    )
    return [
        ReliabilityBin(
            position=row["position"],
            lower=row["lower"],
            upper=row["upper"],
            rows=row["rows"],
            mean_confidence=row["confidence_mean"],
            accuracy=row["accuracy"],
        )
        for row in table.filter(chosen).sort_by("position").to_pylist()
    ]


def _classes(lineage: Lineage) -> list[ClassCount]:
    """Count labels against gold, without holding the texts; nothing where the split is missing."""
    folder = lineage.labels.path / "unlabeled"
    if not folder.is_dir():
        return []
    pairs = ds.dataset(folder, format="parquet").to_table(columns=["label", "gold"])
    counts = pairs.group_by(["label", "gold"]).aggregate([([], "count_all")]).to_pylist()
    has_gold = any(count["gold"] is not None for count in counts)
    found = []
    for label in lineage.experiment.task.label_names:
        labelled = [count for count in counts if count["label"] == label]
        with_gold = sum(count["count_all"] for count in labelled if count["gold"] is not None)
        right = sum(count["count_all"] for count in labelled if count["gold"] == label)
        found.append(
            ClassCount(
                label=label,
                labelled=sum(count["count_all"] for count in labelled),
                gold=sum(count["count_all"] for count in counts if count["gold"] == label)
                if has_gold
                else None,
                right=right / with_gold if with_gold else None,
            )
        )
    return found


def _scores(lineage: Lineage) -> ScoreTables:
    folder = lineage.scores.require().path
    return ScoreTables(
        models=_SCORES.validate_json((folder / "scores.json").read_bytes()),
        mistakes=_mistakes(lineage),
    )


def _mistakes(lineage: Lineage) -> list[Mistake]:
    """Pick the test rows on which the student was wrong and surest of itself."""
    table = pq.read_table(lineage.scores.path / "predictions.parquet")
    own = pc.field("model") == lineage.experiment.own_student
    wrong = table.filter(own & (pc.field("gold") != pc.field("predicted"))).to_pylist()
    wrong.sort(key=lambda row: (-max(row["probabilities"]), row["row_id"]))
    shown = wrong[:_MISTAKES_SHOWN]
    ids = pa.array([row["row_id"] for row in shown], pa.string())
    of_shown = pc.field("row_id").isin(ids)
    corpus = ds.dataset(lineage.corpus.path / "test", format="parquet")
    texts = corpus.to_table(columns=["row_id", "text"], filter=of_shown).to_pylist()
    text_of = {row["row_id"]: row["text"] for row in texts}
    teacher = table.filter((pc.field("model") == "teacher") & of_shown).to_pylist()
    label_of = {row["row_id"]: row["predicted"] for row in teacher}
    return [
        Mistake(
            text=text_of[row["row_id"]],
            gold=row["gold"],
            student=row["predicted"],
            confidence=max(row["probabilities"]),
            teacher=label_of.get(row["row_id"]),
        )
        for row in shown
    ]


def _cascade(cascade: Artifact) -> CascadeTables:
    folder = cascade.require().path
    return CascadeTables(
        summary=CascadeSummary.model_validate_json((folder / "cascade.json").read_bytes()),
        curve=pq.read_table(folder / "curve.parquet"),
    )


def _bench(bench: Artifact) -> BenchTables:
    folder = bench.require().path
    return BenchTables(
        summary=BenchSummary.model_validate_json((folder / "bench.json").read_bytes()),
        machine=dict(bench.manifest().details.get("machine", {})),
    )
