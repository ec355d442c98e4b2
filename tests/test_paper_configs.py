"""The papers' experiments, at every scale: all that can be known of them without hub or GPU."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_job

from llkd_ray.cli import parser_of
from llkd_ray.config import Experiment, LLKDRule, VLLMTeacher, load_experiment
from llkd_ray.lineage import Lineage
from llkd_ray.teacher.pretrained import is_on_hub

PAPER = ROOT / "jobs/configs/paper"
EXPERIMENTS = sorted(PAPER.glob("*.toml"))
GPUS = {"1-gpu": 1, "8-gpus": 8, "64-gpus": 64}
CLASSES = {
    "llkd-arxiv": 10,
    "llkd-bios": 28,
    "llkd-emotions": 6,
    "llkd-pubmed": 5,
    "llkd-yahoo": 10,
    "pgkd-ag-news": 4,
    "pgkd-amazon-6": 6,
    "pgkd-huffpost": 41,
    "pgkd-yahoo": 10,
}
every_experiment = pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)


def at_scale(file: Path, *arguments: str) -> Experiment:
    """Load an experiment as a job does, arguments `@FILE` of this folder among them."""
    told = [f"@{PAPER / said[1:]}" if said.startswith("@") else said for said in arguments]
    parsed = parser_of("").parse_args([str(file), *told])
    return load_experiment(parsed.experiment, parsed.overrides)


def lineage_without_hub(file: Path, *arguments: str) -> Lineage:
    """Name the artifacts as if the texts were the embedded ones, whose identity needs no hub."""
    embedded = ["corpus.source=trec"]
    if load_experiment(file).task.examples_source:
        embedded.append("task.examples_source=trec")
    return Lineage(at_scale(file, *arguments, *embedded))


def test_all_data_sets_of_both_papers_are_there() -> None:
    assert {file.stem: len(load_experiment(file).task.labels) for file in EXPERIMENTS} == CLASSES


@every_experiment
def test_models_and_method_are_the_papers(file: Path) -> None:
    experiment = load_experiment(file)
    assert experiment.name == file.stem
    teachers = [
        experiment.teacher.model,
        at_scale(file, "@gemma-7b.args").teacher.model,
    ]
    assert [model.partition("@")[0] for model in teachers] == [
        "meta-llama/Meta-Llama-3-8B",
        "google/gemma-7b",
    ]
    student = experiment.student.model
    match file.stem.partition("-")[0]:
        case "llkd":
            assert student.startswith("FacebookAI/roberta-base@")
            assert isinstance(experiment.selection, LLKDRule)
            assert experiment.selection.cadence == "step"
            assert experiment.calibration.kind == "none"
        case "pgkd":
            assert student.startswith("google-bert/bert-base-uncased@")
            assert experiment.guide.seed_rows == 1000
            assert experiment.guide.validation_rows == 200
            assert experiment.serve.student == "guided"
    assert all(is_on_hub(model) for model in (*teachers, student))


@every_experiment
def test_a_gold_value_means_one_label(file: Path) -> None:
    labels = load_experiment(file).task.labels
    values = [value for label in labels for value in label.gold or (label.name,)]
    assert len(values) == len(set(values))


@pytest.mark.parametrize("scale", GPUS)
@every_experiment
def test_no_more_gpus_are_asked_for_than_there_are(file: Path, scale: str) -> None:
    experiment = at_scale(file, f"@{scale}.args")
    teacher, train = experiment.teacher, experiment.train
    assert isinstance(teacher, VLLMTeacher)
    of_teachers = teacher.actors.max * teacher.actors.num_gpus * teacher.engine.tensor_parallel_size
    assert of_teachers == GPUS[scale]
    assert train.use_gpu
    assert train.most_workers <= GPUS[scale]


@every_experiment
def test_labels_are_the_same_at_every_scale_and_students_at_8_and_64_gpus(file: Path) -> None:
    one, eight, many = (lineage_without_hub(file, f"@{scale}.args") for scale in GPUS)
    assert one.labels.path == eight.labels.path == many.labels.path
    assert eight.own.path == many.own.path
    assert lineage_without_hub(file, "@gemma-7b.args").labels.path != one.labels.path
    assert len({artifact.path for artifact in many.artifacts}) == len(many.artifacts)


def test_a_job_takes_its_scale_from_a_file(tmp_path: Path) -> None:
    done = run_job(
        "prepare",
        *(str(EXPERIMENTS[0]), f"@{PAPER / '8-gpus.args'}", f"runs={tmp_path}", "--dry-run"),
    )
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout)
    assert resolved["teacher"]["actors"]["max"] == 8
    assert resolved["train"]["zero_stage"] == 1


def test_a_line_of_such_a_file_may_be_blank_or_a_comment(tmp_path: Path) -> None:
    file = tmp_path / "few.args"
    file.write_text("# Why.\n\n  train.epochs=7  \n#train.steps=3\nname=a trial\n")
    parsed = parser_of("").parse_args(["e.toml", "seed=1", f"@{file}"])
    assert parsed.overrides == ["seed=1", "train.epochs=7", "name=a trial"]
