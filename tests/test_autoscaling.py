"""Room for teachers and for those who read for them, on a private Ray and on one that grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from conftest import ROOT, Run

from llkd_ray.cluster import TASK_CPUS, require_room
from llkd_ray.config import RaySection
from llkd_ray.errors import ClusterError

pytestmark = pytest.mark.slow

# Answers at the rate of a model, from a hash: only the cluster is looked at.
SCRIPTED = ("teacher.kind=scripted", "teacher.max_unlabeled_rows=200", "ray.num_cpus=2")


@pytest.mark.usefixtures("ray_local")
def test_teachers_that_leave_a_reader_its_share_of_the_cpus_have_room() -> None:
    config = RaySection(num_cpus=2)
    require_room(config, 1, 2 - TASK_CPUS)
    require_room(config, 2, (2 - TASK_CPUS) / 2)
    with pytest.raises(ClusterError):
        require_room(config, 1, 2 - TASK_CPUS + 0.01)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("actors", "num_cpus", "num_gpus", "remedy"),
    [
        (2, 1.0, 0.0, "set teacher.actors.num_cpus to 0.875 at most"),
        (1, 2.0, 0.0, "set teacher.actors.num_cpus to 1.75 at most"),
        (1, 1.0, 1.0, "this machine has 0; lower teacher.actors.num_gpus"),
    ],
)
def test_teachers_that_a_private_ray_never_has_room_for_are_refused(
    actors: int, num_cpus: float, num_gpus: float, remedy: str
) -> None:
    assert ray.cluster_resources().get("GPU", 0.0) == 0.0
    with pytest.raises(ClusterError, match=remedy):
        require_room(RaySection(num_cpus=2), actors, num_cpus, num_gpus)


@pytest.mark.usefixtures("ray_local")
def test_a_cluster_that_is_joined_may_grow_so_the_wait_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with caplog.at_level("INFO", "llkd_ray"):
        require_room(RaySection(), 3, 1.0)
    assert "3 teachers ask for 3.25 CPUs" in caplog.text


@pytest.mark.usefixtures("ray_local")
def test_labelling_refuses_teachers_that_would_starve_its_readers(run: Run) -> None:
    greedy = Run((*run.overrides, *SCRIPTED, "teacher.actors={min = 2, max = 2, num_cpus = 1.0}"))
    greedy.stage("prepare")
    with pytest.raises(ClusterError, match=r"set teacher\.actors\.num_cpus to 0\.875 at most"):
        greedy.stage("label")


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    "actors",
    [
        "{min = 1, max = 1, num_cpus = 1.75}",
        "{min = 2, max = 2, num_cpus = 0.875}",
        "{min = 1, max = 3, num_cpus = 1.0}",
    ],
)
def test_teachers_never_starve_their_readers(run: Run, actors: str) -> None:
    tight = Run((*run.overrides, *SCRIPTED, f"teacher.actors={actors}"))
    tight.stage("prepare")
    tight.stage("label")
    assert tight.lineage.labels.made


def test_a_cluster_grows_for_a_labelling_run_and_shrinks_after_it(tmp_path: Path) -> None:
    benchmark = ROOT / "jobs/benchmarks/autoscaling.py"
    command = [sys.executable, str(benchmark), "--quick", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            shown, _ = running.communicate(timeout=570)
        finally:
            # It ends its cluster when it is asked to end, not when it is killed.
            running.terminate()
    assert running.returncode == 0, shown
    seen = json.loads(shown.splitlines()[-1])
    nodes = [seen[name] for name in ("nodes_start", "nodes_max", "nodes_end")]
    assert nodes == [1, 3, 1], shown
    assert seen["teachers_max"] == 3
    assert seen["rows_left"] == 0
    assert (tmp_path / "autoscaling.png").stat().st_size > 0
    assert json.loads((tmp_path / "autoscaling.json").read_text())["samples"]
