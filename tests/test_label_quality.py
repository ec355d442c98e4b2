import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from llkd_ray import sources
from llkd_ray.config import VLLMTeacher, load_experiment
from llkd_ray.embedded import TEACHERS
from llkd_ray.teacher.layout import Codec
from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.verbalizer import choose_readout

DATA_SETS = ("trec6", "ag_news", "snips", "emotion", "banking77", "csabstruct")


def benchmark(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/benchmarks/label_quality.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def trec6(tmp_path: Path) -> Path:
    """Questions of the built-in corpus, where a user would have a folder of gold rows."""
    folder = tmp_path / "trec6"
    folder.mkdir()
    corpus = load_experiment(ROOT / "jobs/configs/quickstart.toml").corpus
    rows = [{"text": row.text, "label": row.gold} for row in sources.read(corpus)]
    for split, start in (("train", 0), ("validation", 600), ("test", 700)):
        pq.write_table(pa.Table.from_pylist(rows[start : start + 600]), folder / f"{split}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", TEACHERS)
def test_an_embedded_teacher_reads_each_label_of_a_data_set_in_one_pass(model: str) -> None:
    experiments = [load_experiment(ROOT / f"jobs/configs/{name}.toml") for name in DATA_SETS]
    folder = teacher_folder(model, experiments[0].cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    codec = Codec(tokenizer)  # Takes seconds where there are a quarter of a million tokens.
    for experiment in experiments:
        assert isinstance(experiment.teacher, VLLMTeacher)
        readout = choose_readout(tokenizer, experiment.task, experiment.teacher, codec)
        assert (readout.kind, len(readout.branches)) == ("first_token", 1), experiment.name


@pytest.mark.slow
def test_quick_gives_every_calibrations_figures_and_runs_that_are_kept_are_not_done_again(
    trec6: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    done = benchmark("--quick", "--runs", str(runs), str(trec6), timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    of_teacher = figures["trec6"]["smollm2-135m-instruct"]
    assert set(of_teacher) == {"raw", "contextual", "batch", "temperature", "vector", "stacked"}
    for of_calibration in of_teacher.values():
        assert of_calibration["rows"] == figures["rows"] == 100
        assert all(0 <= value <= 1 for name, value in of_calibration.items() if name != "rows")
    # A temperature moves no label.
    assert of_teacher["temperature"]["accuracy"] == of_teacher["batch"]["accuracy"]
    again = benchmark("--quick", "--runs", str(runs), str(trec6))
    assert json.loads(again.stdout.splitlines()[-1])["trec6"] == figures["trec6"]


def test_a_folder_without_an_experiment_of_its_name_is_told(tmp_path: Path) -> None:
    done = benchmark(str(tmp_path / "elsewhere"))
    assert done.returncode == 1
    assert "there is no elsewhere.toml in jobs/configs" in done.stderr


def test_a_folder_without_its_files_is_told(tmp_path: Path) -> None:
    done = benchmark(str(tmp_path / "trec6"))
    assert done.returncode == 1
    assert "there is no train.parquet" in done.stderr
