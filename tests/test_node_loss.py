"""A node of a cluster, of several raylets on this machine, is lost in the middle of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own: the session's Ray is another one.
_SCRIPT = """
import json, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from test_train_on_ray import train_small, wait_for

labels, corpus, out, encoder = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
lost = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
gone = threading.Event()


def lose_a_node():
    # Workers write their parts of a checkpoint each in its own time.
    wait_for(lambda: len(list((out / "ray_train/epoch-0002").glob("rows-*.npz"))) == 2)
    cluster.remove_node(lost, allow_graceful=False)
    gone.set()


threading.Thread(target=lose_a_node).start()
trained = train_small(
    labels, corpus, out, encoder, num_workers=(1, 2), zero_stage=0, max_failures=1
)
parts = sorted(path.name for path in (out / "signals").glob("epoch-0008-*"))
print(json.dumps({"gone": gone.is_set(), "parts": len(parts), "details": trained.details}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_training_goes_on_with_the_workers_that_are_left(
    tmp_path: Path, folders: tuple[Path, Path], small_encoder: Path
) -> None:
    # Ray Train may first hope for the lost node; a minute is what it would wait for it.
    environment = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *map(str, (*folders, tmp_path, small_encoder))],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=Path(__file__).parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["gone"]
    assert told["parts"] == 1
    assert told["details"]["epochs"] == 8
