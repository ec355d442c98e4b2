"""Labelling with the real teacher. `small_run` has labelled once; the kill test does it again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, ROOT, Run, command, run_job

from llkd_ray import schema
from llkd_ray.corpus import read_shards

pytestmark = pytest.mark.slow


def table(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(shard) for shard in read_shards(folder / split))


def test_every_row_asked_about_has_one_label_and_nothing_else_has(small_run: Run) -> None:
    lineage = small_run.lineage
    asked = table(lineage.corpus.path, "unlabeled").slice(0, 160)
    labels = table(lineage.labels.path, "unlabeled")
    assert labels.schema.equals(schema.labels(6))
    assert labels.select(schema.TEXT.names).equals(asked)
    test = table(lineage.corpus.path, "test")
    assert table(lineage.labels.path, "test").select(schema.TEXT.names).equals(test)
    rows = lineage.readouts.manifest().rows
    assert (rows.taken, rows.rejected) == (160 + len(test), 0)


def test_labels_follow_from_the_stored_log_probabilities(small_run: Run) -> None:
    labels = table(small_run.lineage.labels.path, "unlabeled")
    logprobs = np.array(labels.column("logprobs").to_pylist())
    mass = np.exp(logprobs).sum(axis=1)
    np.testing.assert_allclose(labels.column("label_mass").to_numpy(), mass, rtol=1e-5)
    assert (mass > 0).all()
    assert (mass <= 1 + 1e-5).all()
    normal = np.exp(logprobs) / mass[:, None]
    calibrated = normal / normal.mean(axis=0)
    calibrated /= calibrated.sum(axis=1, keepdims=True)
    stored = np.array(labels.column("probabilities").to_pylist())
    np.testing.assert_allclose(stored, calibrated, atol=1e-5)
    names = np.array(small_run.experiment.task.label_names)
    assert labels.column("label").to_pylist() == names[stored.argmax(axis=1)].tolist()
    np.testing.assert_allclose(labels.column("confidence").to_numpy(), stored.max(axis=1))


def test_the_teacher_is_right_far_more_often_than_by_chance(small_run: Run) -> None:
    labels = table(small_run.lineage.labels.path, "unlabeled")
    right = pc.equal(labels.column("label"), labels.column("gold")).to_numpy()
    assert right.mean() > 0.5


def test_the_shared_prefix_comes_from_the_cache(small_run: Run) -> None:
    summary = small_run.summary()["labels"]
    assert summary["cached_tokens"] / summary["prompt_tokens"] > 0.7


def test_another_calibration_asks_the_teacher_nothing(small_run: Run) -> None:
    done = small_run.job("label", "calibration.kind=none", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert "readouts" not in done.stdout
    assert "labels-" in done.stdout


def test_a_killed_run_goes_on_and_labels_nothing_twice(run: Run) -> None:
    more = ("teacher.max_unlabeled_rows=128", 'teacher.splits=["unlabeled"]')
    overrides = (str(QUICKSTART), *run.overrides, *more)
    assert run_job("prepare", *overrides).returncode == 0
    lineage = Run((*run.overrides, *more)).lineage
    parts = lineage.readouts.making / "unlabeled"
    with subprocess.Popen(
        command("label", *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as killed:
        deadline = time.monotonic() + 300
        while not list(parts.glob("*/*.parquet")):
            assert killed.poll() is None, "the job ended before it wrote a part"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(killed.pid, signal.SIGKILL)
    assert not lineage.readouts.made
    time.sleep(5)  # What Ray had under way may still land; from here on it must not.
    kept = {row for part in parts.glob("*/*.parquet") for row in _ids(part)}
    assert kept
    done = run_job("label", *overrides)
    assert done.returncode == 0, done.stderr
    details = lineage.readouts.manifest().details
    assert details["duplicates"] == 0
    ids = table(lineage.readouts.path, "unlabeled").column("row_id").to_pylist()
    asked = table(lineage.corpus.path, "unlabeled").slice(0, 128).column("row_id").to_pylist()
    assert ids == asked
    assert details["answered_now"] == 128 - len(kept)


def _ids(part: Path) -> list[str]:
    ids: list[str] = pq.read_table(part, columns=["row_id"]).column("row_id").to_pylist()
    return ids


def test_labelling_without_a_corpus_names_the_job_to_run(run: Run) -> None:
    done = run.job("label")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "run python jobs/prepare.py" in done.stderr


def test_a_finished_labelling_is_left_alone(small_run: Run) -> None:
    before = (small_run.lineage.labels.path / "manifest.json").stat().st_mtime_ns
    started = time.perf_counter()
    done = small_run.job("label")
    assert time.perf_counter() - started < 10
    assert "is there already" in done.stdout
    assert (small_run.lineage.labels.path / "manifest.json").stat().st_mtime_ns == before


def test_the_manifest_says_what_made_it(small_run: Run) -> None:
    manifest = json.loads((small_run.lineage.labels.path / "manifest.json").read_text())
    assert manifest["inputs"] == {
        "corpus": small_run.lineage.corpus.fingerprint,
        "readouts": small_run.lineage.readouts.fingerprint,
    }
