"""What tests share: one private Ray, one small experiment, and the whole flow run once on it."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_data import make_split_folders
from training_workers import make_small_encoder, run_workers, work_on

from llkd_ray.cluster import ray_session
from llkd_ray.config import Experiment, RaySection, load_experiment
from llkd_ray.lineage import Lineage

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# A shell script's background jobs ignore Ctrl-C, and so would the jobs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "jobs"))
QUICKSTART = ROOT / "jobs/configs/quickstart.toml"

# The quickstart on a sample: every stage is real, with less to do.
SMALL = (
    "corpus.validation_fraction=0.02",
    "corpus.test_fraction=0.02",
    "corpus.shard_rows=100",
    "teacher.max_unlabeled_rows=160",
    "teacher.batch_size=32",
    "train.epochs=2",
    "evaluate.bootstrap_resamples=100",
    "bench.single_requests=5",
    "bench.batch_requests=1",
    "bench.concurrency=[2]",
    "bench.sweep_requests=2",
    "bench.warmup_requests=1",
    "bench.open_s=1.0",
    "bench.search_tries=2",
)


# Slow tests of the stream beside the others: those that wait, for nodes that come, go, or are found
# dead, and as many more as make both streams equally long.
BESIDE = (
    "test_autoscaling",
    "test_engine",
    "test_exchange",
    "test_http_teacher",
    "test_label_quality",
    "test_node_loss",
    "test_storage",
    "test_students",
    "test_submit",
    "test_train_on_ray",
    "test_training",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stream",
        choices=("slow", "beside"),
        help="most slow tests, or all others; .ci/run has both run at once",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "small_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1500))  # Whichever is first makes it.
    stream = config.getoption("--stream")
    if stream is None:
        return
    of: dict[str, list[pytest.Item]] = {"slow": [], "beside": []}
    for item in items:
        slow = item.get_closest_marker("slow") and item.path.stem not in BESIDE
        of["slow" if slow else "beside"].append(item)
    items[:] = of.pop(stream)
    [others] = of.values()
    config.hook.pytest_deselected(items=others)


@dataclass(frozen=True)
class Run:
    """A run of the small experiment in a folder of its own."""

    overrides: tuple[str, ...]

    @property
    def experiment(self) -> Experiment:
        return load_experiment(QUICKSTART, self.overrides)

    @property
    def lineage(self) -> Lineage:
        return Lineage(self.experiment)

    def job(
        self, verb: str, *more: str, timeout_s: float = 500
    ) -> subprocess.CompletedProcess[str]:
        """Run jobs/VERB.py in a process of its own, as a user does."""
        return run_job(verb, str(QUICKSTART), *self.overrides, *more, timeout_s=timeout_s)

    def stage(self, verb: str) -> None:
        """Do what jobs/VERB.py does in this process: it takes the Ray that is there, `ray_local`.

        Seconds less than `job`, where what a user sees of the job is not the point.
        """
        getattr(importlib.import_module(verb), verb)(self.experiment)

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.lineage.run / "summary.json").read_text())
        return summary


def run_job(verb: str, *arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(verb, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def command(verb: str, *arguments: str) -> Sequence[str]:
    return [sys.executable, str(ROOT / f"jobs/{verb}.py"), *arguments]


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private Ray of 2 CPUs for the whole session."""
    with ray_session(RaySection(num_cpus=2)):
        yield


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The small experiment, nothing made yet."""
    return Run((f"runs={tmp_path}", *SMALL))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole flow, run once: real teacher, training, endpoints."""
    run = Run((f"runs={tmp_path_factory.mktemp('runs')}", *SMALL))
    done = run.job("run", timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Labels and corpus of 120 questions to train on, 40 to validate and 60 to test."""
    return make_split_folders(tmp_path_factory.mktemp("data"), 120, 40, 60)


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that trains in seconds."""
    return make_small_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def work(folders: tuple[Path, Path], small_encoder: Path) -> Any:
    """What training workers are told."""
    return work_on(folders, small_encoder)


@pytest.fixture(scope="session")
def one_worker(
    tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path], small_encoder: Path
) -> tuple[Path, Any]:
    """What one worker leaves that is told `work` as it stands, and its progress."""
    out = tmp_path_factory.mktemp("one-worker")
    return out, run_workers(out, work_on(folders, small_encoder), 1)
