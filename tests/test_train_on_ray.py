"""Real Ray Train: what a run leaves, and what it survives."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from training_data import NAMES
from training_workers import TRAIN

from llkd_ray import schema
from llkd_ray.config import EncoderStudent, LLKDRule


def train_small(labels, corpus, out, encoder, **train_settings):
    from llkd_ray.student.train import train

    return train(
        labels,
        out,
        corpus=corpus,
        label_names=NAMES,
        selection=LLKDRule(),
        student=EncoderStudent(model=str(encoder), max_length=64),
        section=TRAIN.model_copy(update={"epochs": 8, **train_settings}),
        seed=0,
        cache="unused",
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, folders, small_encoder, ray_local):  # noqa: ARG001
    out = tmp_path_factory.mktemp("unbroken")
    return out, train_small(*folders, out, small_encoder)


@pytest.mark.slow
def test_a_trained_student_is_a_plain_pipeline(unbroken):
    from transformers import pipeline

    out, trained = unbroken
    assert trained.rows.taken == trained.rows.kept == 120
    assert sorted(path.name for path in out.iterdir()) == [
        "audit.parquet",
        "epochs.parquet",
        "model",
        "signals",
    ]
    assert not list((out / "model").glob("*.bin"))
    audit, epochs = (
        pq.read_table(out / "audit.parquet"),
        pq.read_table(out / "epochs.parquet"),
    )
    assert audit.schema.equals(schema.AUDIT)
    assert epochs.schema.equals(schema.EPOCHS)
    assert audit.num_rows == 8 * len(NAMES)
    kept = sum(epochs["kept"].to_pylist())
    assert sum(audit["kept"].to_pylist()) == kept
    assert trained.details["rows_used_fraction"] == kept / (8 * 120)
    classify = pipeline("text-classification", str(out / "model"), device="cpu")
    texts = ["Who wrote Hamlet ?", "Where is Ulm ?"]
    answers = classify(texts, top_k=None)
    assert {answer["label"] for answer in answers[0]} == set(NAMES)
    assert "macro-F1" in (out / "model/README.md").read_text()


def assert_same_run(out, trained, unbroken):
    reference, of_reference = unbroken
    assert pq.read_table(out / "audit.parquet").equals(pq.read_table(reference / "audit.parquet"))
    kept = dict(of_reference.details)
    assert {**trained.details, "seconds": 0} == {**kept, "seconds": 0}
    assert (out / "model/model.safetensors").read_bytes() == (
        reference / "model/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_training_survives_a_worker_that_is_killed(tmp_path, folders, small_encoder, unbroken):
    killed = []

    def kill_one():
        wait_for((tmp_path / "ray_train/epoch-0001/progress.json").exists)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray's come and go.
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return

    killer = threading.Thread(target=kill_one)
    killer.start()
    trained = train_small(*folders, tmp_path, small_encoder, max_failures=1)
    killer.join()
    assert killed
    assert_same_run(tmp_path, trained, unbroken)


@pytest.mark.slow
def test_training_goes_on_after_the_driver_was_killed(tmp_path, folders, small_encoder, unbroken):
    script = f"""
from pathlib import Path
from llkd_ray.cluster import ray_session
from llkd_ray.config import RaySection
from test_train_on_ray import train_small
with ray_session(RaySection(num_cpus=2)):
    train_small(Path({str(folders[0])!r}), Path({str(folders[1])!r}), Path({str(tmp_path)!r}),
                Path({str(small_encoder)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as driver:
        wait_for((tmp_path / "ray_train/epoch-0002/progress.json").exists)
        for process in (psutil.Process(driver.pid), *psutil.Process(driver.pid).children(True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray's end with the driver.
                process.kill()
    done = max(path.name for path in (tmp_path / "ray_train").glob("epoch-*"))
    assert done < "epoch-0008"
    trained = train_small(*folders, tmp_path, small_encoder)
    assert_same_run(tmp_path, trained, unbroken)
