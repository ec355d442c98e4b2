"""The README's first command on a sample: every stage real, and what it promises."""

import signal
import subprocess
import time

import pytest
from conftest import QUICKSTART, ROOT, Run, command

from llkd_ray import schema
from llkd_ray.config import load_experiment

pytestmark = pytest.mark.slow


def test_the_summary_has_every_documented_key_with_real_numbers(small_run: Run) -> None:
    summary = schema.Summary.model_validate(small_run.summary())
    assert summary.corpus is not None
    assert summary.labels is not None
    assert summary.labels.rows + summary.labels.rejected == 160
    assert summary.labels.duplicates == 0
    assert summary.labels.accuracy is not None
    assert summary.labels.rows_per_s > 0
    assert summary.teacher is not None
    assert summary.student is not None
    assert summary.student.rule == "llkd"
    assert summary.student.optimizer_steps > 0
    assert 0 < summary.student.rows_used_fraction < 1
    assert summary.bench is not None
    assert summary.bench.speedup == pytest.approx(
        summary.bench.teacher.batch64_s / summary.bench.student.batch64_s
    )
    assert summary.bench.cost_ratio == pytest.approx(
        summary.bench.teacher.cost_usd_per_million / summary.bench.student.cost_usd_per_million
    )
    assert set(summary.seconds) >= {"prepare", "label", "train", "evaluate", "bench"}


def test_a_finished_run_is_left_alone_and_ends_with_the_report(small_run: Run) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in small_run.lineage.run.glob("*/manifest.json")
    }
    started = time.perf_counter()
    done = small_run.job("run")
    assert time.perf_counter() - started < 60
    assert done.returncode == 0, done.stderr
    after = {
        path: path.stat().st_mtime_ns for path in small_run.lineage.run.glob("*/manifest.json")
    }
    assert after == before
    assert "report.html" in done.stdout


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_before(small_run: Run) -> None:
    changed = Run((*small_run.overrides, "train.learning_rate=1e-4"))
    assert changed.lineage.labels.made
    assert not changed.lineage.student().made
    assert not changed.lineage.bench.made
    assert Run((*small_run.overrides, "bench.single_requests=6")).lineage.student().made


def test_the_quickstart_labels_at_least_2000_rows_and_scores_on_about_500() -> None:
    experiment = load_experiment(QUICKSTART)
    assert (experiment.teacher.max_unlabeled_rows or 0) >= 2000
    assert 0.08 <= experiment.corpus.test_fraction <= 0.1


def test_ctrl_c_ends_a_run_with_one_line_and_no_half_artifact(run: Run) -> None:
    with subprocess.Popen(
        command("run", str(QUICKSTART), *run.overrides),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        deadline = time.monotonic() + 300
        while not run.lineage.readouts.making.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert "run the same command again to go on" in errors
    assert run.lineage.corpus.made
    assert not run.lineage.readouts.made
    assert not run.lineage.labels.made
