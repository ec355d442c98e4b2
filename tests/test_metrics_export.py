"""What a labelling run tells Prometheus, on a node of a private Ray."""

import re
import time
import urllib.request
from collections.abc import Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from conftest import QUICKSTART

from llkd_ray.config import VLLMTeacher, load_experiment
from llkd_ray.teacher.actor import Opening, TeacherActor
from llkd_ray.teacher.engine import engine_environment
from llkd_ray.teacher.ledger import Ledger, range_name

pytestmark = pytest.mark.slow

TEXTS = ["Who wrote Hamlet ?", "Where is Lima ?", "How many days has a week ?"]


def scrape() -> str:
    """Return what the agent of this node exports, as Prometheus reads it."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read(), "utf-8")


def workers(exported: str) -> set[str]:
    """Return the workers that export anything: other tests' live in the same Ray."""
    return set(re.findall(r'WorkerId="(\w+)"', exported))


def total(exported: str, name: str, others: Set[str] = frozenset()) -> float:
    """Sum a metric over its labels, those of other workers aside; NaN where there is none."""
    lines = re.findall(rf"^{name}(?:_total)?({{[^}}]*}})? (\S+)$", exported, re.MULTILINE)
    values = [float(value) for labels, value in lines if not workers(labels) & others]
    return sum(values) if values else float("nan")


@pytest.mark.usefixtures("ray_local")
def test_prometheus_sees_the_rows_of_a_teacher_and_the_tokens_of_its_engine(
    tmp_path: Path,
) -> None:
    experiment = load_experiment(QUICKSTART)
    ledger = Ledger(tmp_path, len(experiment.task.labels))
    ids = [f"{position:064x}" for position in range(len(TEXTS))]
    batch = pa.table(
        {
            "row_id": ids,
            "text": TEXTS,
            "attempt": pa.array([1] * len(TEXTS), pa.int32()),
            "parts": [range_name(ids[0], ids[-1])] * len(TEXTS),
        }
    )
    assert isinstance(experiment.teacher, VLLMTeacher)
    opening = Opening.of(experiment)
    prompt = opening.prompt()
    assert prompt is not None
    others = workers(scrape())
    environment = engine_environment(experiment.teacher.engine, threads=2)
    actor: Any = (
        ray.remote(TeacherActor)
        .options(num_cpus=1, runtime_env={"env_vars": environment})
        .remote(opening, ledger)
    )
    counted = ray.get(actor.__call__.remote(batch), timeout=300)
    assert counted.column("rows").to_pylist() == [len(TEXTS)]
    tokens = counted.column("prompt_tokens")[0].as_py()
    expected = {
        "ray_llkd_label_rows": len(TEXTS),
        "ray_llkd_label_prompt_tokens": tokens,
        # The first row is asked about once more, for what all rows share to be in the cache.
        "ray_vllm_prompt_tokens": tokens + len(prompt.encode(TEXTS[:1])[0].ids),
    }
    # Workers report to the agent every few seconds.
    deadline = time.monotonic() + 60
    while {name: total(exported := scrape(), name, others) for name in expected} != expected:
        assert time.monotonic() < deadline, exported[-4000:]
        time.sleep(2)
    ray.kill(actor)
