"""What the comparison of rules over data sets asks for, and how it reads a comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

import llkd_tuning
import student_quality

from llkd_ray.compare.variants import variants_of
from llkd_ray.config import RULES, load_experiment, with_overrides


def test_every_variant_is_an_experiment_of_every_data_set() -> None:
    for data in student_quality.SPLITS:
        experiment = load_experiment(
            ROOT / f"jobs/configs/{data}.toml",
            ['teacher.splits=["unlabeled","validation","test"]', *student_quality.TRAINING],
        )
        for settings in student_quality.VARIANTS.values():
            with_overrides(experiment, settings)
    assert not set(RULES) & set(student_quality.VARIANTS)


def test_every_tuned_setting_is_another_experiment() -> None:
    experiment = load_experiment(
        ROOT / "jobs/configs/trec6.toml",
        ["selection.rule=llkd", 'teacher.splits=["unlabeled","validation","test"]'],
    )
    overrides = [
        f"compare.variants.{name}={json.dumps(settings)}"
        for name, settings in llkd_tuning.VARIANTS.items()
        if name != llkd_tuning.DEFAULT
    ]
    variants = variants_of(with_overrides(experiment, [*overrides, 'compare.rules=["llkd"]']))
    found = {
        variant.experiment.model_dump_json(include={"selection", "calibration"})
        for variant in variants
    }
    assert len(found) == len(variants) == len(llkd_tuning.VARIANTS)


def test_at_most_a_quarter_of_eight_epochs_is_compared() -> None:
    of_eight_epochs = 8 * student_quality.LABELLED_ROWS / 32
    assert of_eight_epochs == student_quality.ALL_STEPS
    assert of_eight_epochs / 4 >= student_quality.STEPS


def test_lines_are_those_of_the_last_epochs_after_the_teachers() -> None:
    line = {
        "variant": "llkd",
        "criterion": "last",
        "accuracy": 0.8,
        "macro_f1": 0.7,
        "macro_f1_sd": None,
        "validation_macro_f1": 0.75,
        "row_steps": 3586.0,
        "steps": 113.0,
        "seconds": 60.0,
        "over": {"all": {"value": 0.02, "low": -0.01, "high": 0.05}},
    }
    table = {
        "teacher": {"accuracy": 0.6, "macro_f1": 0.5},
        "lines": [{**line, "criterion": "gold", "accuracy": 0.9}, line],
    }
    lines = student_quality.lines_of(table)
    assert list(lines) == ["teacher", "llkd"]
    assert lines["llkd"]["accuracy"] == 0.8
    assert lines["llkd"]["validation"] == 0.75
    assert "macro_f1_sd" not in lines["llkd"]  # Of one seed there is none.
    assert (lines["llkd"]["over_all"], lines["llkd"]["over_all_low"]) == (0.02, -0.01)


@pytest.mark.parametrize(
    ("data", "told"), [("trec", "there are trec6, snips"), ("trec6", "there is no train.parquet")]
)
def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path, data: str, told: str) -> None:
    folder = tmp_path / data
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/benchmarks/student_quality.py", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert str(folder) in done.stderr
    assert told in done.stderr
