"""Jobs on a running cluster, submitted as the README says."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import QUICKSTART, ROOT, Run

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

import autoscaling

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
# `python` in a submitted command is the one on the cluster's PATH.
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of one node started from the command line; its jobs are submitted to this URL."""
    gcs, http, agent = autoscaling.free_ports(3)
    log = tmp_path_factory.mktemp("cluster") / "log"
    start = [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2"]
    start += [f"--dashboard-port={http}", "--node-ip-address=127.0.0.1"]
    # The session's private Ray has an agent on this machine too.
    start += [f"--dashboard-agent-listen-port={agent}"]
    start += ["--object-store-memory=200000000", "--disable-usage-stats"]
    with (
        log.open("w") as output,
        subprocess.Popen(
            start, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT
        ) as cluster,
    ):
        url = f"http://127.0.0.1:{http}"
        deadline = time.monotonic() + 300
        while not (
            answers(f"{url}/api/version") and answers(f"http://127.0.0.1:{agent}/api/healthz")
        ):
            assert cluster.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield url
        autoscaling.end(cluster)  # Asked to end, it would wait half a minute.


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def submit(dashboard: str, verb: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", f"--address={dashboard}", "--working-dir=."]
    command += ["--runtime-env=cluster/runtime-env.yaml", "--", "python", f"jobs/{verb}.py"]
    return subprocess.run(
        [*command, QUICKSTART.relative_to(ROOT), *overrides],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_label_and_train_run_as_submitted_jobs(
    dashboard: str, run: Run, small_encoder: Path
) -> None:
    small = Run(
        (
            *run.overrides,
            "teacher.max_unlabeled_rows=64",
            'teacher.splits=["unlabeled"]',
            "train.epochs=1",
            f"student.model={small_encoder}",
        )
    )
    small.stage("prepare")
    labelled = submit(dashboard, "label", *small.overrides)
    assert labelled.returncode == 0, labelled.stdout + labelled.stderr
    assert small.lineage.labels.manifest().rows.kept == 64
    trained = submit(dashboard, "train", *small.overrides)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert small.lineage.student().made


def test_a_submitted_job_that_fails_says_why_and_exits_with_1(dashboard: str, run: Run) -> None:
    failed = submit(dashboard, "label", *run.overrides)
    assert failed.returncode == 1
    assert "run python jobs/prepare.py" in failed.stdout + failed.stderr
