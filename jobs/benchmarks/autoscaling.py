"""Does a labelling run make a cluster grow, and does the cluster shrink after it?

An autoscaling Ray cluster on this machine, of one node that can become three: Ray's own autoscaler
decides, and its provider for tests starts each node as processes beside the others. A node has one
CPU and so room for one teacher. Labelling the quickstart's questions with up to three teachers,
every one an engine with one thread, has to bring the nodes up; nodes that are idle go again.

Nodes, teachers and rows left are written down against time. No rate is measured: three nodes of
one machine are no faster than one.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import figures
import psutil
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llkd_ray.config import Experiment, load_experiment
from llkd_ray.errors import ClusterError
from llkd_ray.lineage import Lineage
from llkd_ray.report.figures import SERIES, styled, to_png

JOBS = Path(__file__).parents[1]
QUICKSTART = JOBS / "configs/quickstart.toml"
NODES = 3
# The autoscaler's provider knows the head node by an id that has to be this one.
_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
_STORE_BYTES = 100_000_000
# Weights, cache and libraries of an engine take 4 GiB with the settings below.
_ENGINES_GIB = 4 * NODES + 1
_IDLE_MINUTES = 0.1
_START_TIMEOUT_S = 120
_SHRINK_TIMEOUT_S = 300
_SECONDS_BETWEEN_SAMPLES = 2.0


@dataclass(frozen=True)
class Sample:
    """The cluster and the run at one moment."""

    second: float
    """Since the labelling began."""
    nodes: int
    teachers: int
    """Actors that are ready, which those with an engine are half a minute after their start."""
    rows_left: int

    @property
    def size(self) -> tuple[int, int]:
        """Nodes and teachers."""
        return self.nodes, self.teachers

    def __str__(self) -> str:
        return (
            f"{self.second:6.0f} s: {self.nodes} nodes, {self.teachers} teachers, "
            f"{self.rows_left} rows left"
        )


def overrides(folder: str, *, scripted: bool) -> list[str]:
    """Return what the run changes in the quickstart: more to do, for a pool that may grow."""
    actors = f"{{min = 1, max = {NODES}, num_cpus = 0.75, threads = 1}}"
    teacher = (
        # A first node alone would need more than three minutes: both others come long before.
        ["teacher.kind=scripted", "teacher.rows_per_s=10.0", "teacher.max_unlabeled_rows=2000"]
        if scripted
        else ["teacher.max_unlabeled_rows=3000", "teacher.engine.cpu_kvcache_gib=1"]
    )
    return [
        f"runs={folder}",
        *teacher,
        'teacher.splits=["unlabeled"]',
        "teacher.batch_size=32",
        f"teacher.actors={actors}",
        "corpus.shard_rows=500",
        "corpus.test_fraction=0.0",
        "corpus.validation_fraction=0.0",
    ]


@contextlib.contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[tuple[str, str]]:
    """Hold a cluster of one node that grows to `NODES`.

    Yields the address to join it at and the URL to ask about it.

    At the end every process that it has started is ended, by its id: other Rays on this machine
    are left alone.
    """
    gcs, dashboard, agent = free_ports(3)
    address, url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(autoscaler_config(address)))
    log = folder / "cluster.log"
    start = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--port", str(gcs), "--node-ip-address", "127.0.0.1", "--num-cpus", "1"),
        *("--object-store-memory", str(_STORE_BYTES), "--temp-dir", str(folder / "ray")),
        *("--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)),
        *("--autoscaling-config", str(config), "--disable-usage-stats"),
    ]
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
    }
    with log.open("w") as output:
        head = subprocess.Popen(start, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while count_alive(url) != (1, 0):
            if head.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"the cluster did not start: {log.read_text()[-2000:]}")
            time.sleep(1)
        yield address, url
    finally:
        end(head)


def autoscaler_config(address: str) -> dict[str, Any]:
    """Return what `ray start --autoscaling-config` reads."""
    node = {"CPU": 1, "object_store_memory": _STORE_BYTES}
    return {
        "cluster_name": "one-machine",
        "max_workers": NODES - 1,
        "idle_timeout_minutes": _IDLE_MINUTES,
        # Keys that have to be there; nothing is set up or copied.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "cluster_synced_files": [],
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": _HEAD,
            "gcs_address": address,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": node, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": node,
                "node_config": {},
                "min_workers": 0,
                "max_workers": NODES - 1,
            },
        },
    }


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for open_socket in sockets:
            open_socket.bind(("127.0.0.1", 0))
        return [open_socket.getsockname()[1] for open_socket in sockets]


def end(head: subprocess.Popen[bytes]) -> None:
    """End a cluster's processes, the nodes that its autoscaler started and their workers too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(head.pid).children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    # It would wait half a minute for a cluster that drains; there is none any more.
    head.kill()
    head.wait()


def count_alive(url: str) -> tuple[int, int] | None:
    """Count the nodes and the teachers that are alive; None if the cluster does not answer."""
    from ray.util.state import list_actors, list_nodes
    from ray.util.state.exception import RayStateApiException

    alive: list[tuple[str, str, Any]] = [("state", "=", "ALIVE")]
    try:
        # What the filter leaves out counts as missing, which would be an error.
        nodes = list_nodes(url, filters=alive, raise_on_missing_output=False)
        actors = list_actors(url, filters=alive, raise_on_missing_output=False)
    except (RayStateApiException, ConnectionError):
        return None
    return len(nodes), sum("TeacherActor" in actor.class_name for actor in actors)


def rows_left(experiment: Experiment) -> int:
    """Count the rows that have no answer yet."""
    from llkd_ray.teacher.ledger import Ledger
    from llkd_ray.teacher.status import status

    lineage = Lineage(experiment)
    ledger = Ledger(lineage.ledger, len(experiment.task.labels))
    corpus = lineage.corpus.path
    return sum(split.left for split in status(corpus, experiment.teacher, ledger))


def watch(folder: Path, *, scripted: bool) -> tuple[list[Sample], float]:
    """Label on a cluster and look at it until it is one node again.

    Returns:
        What was seen, and the second at which the labelling ended.
    """
    changes = overrides(str(folder / "runs"), scripted=scripted)
    experiment = load_experiment(QUICKSTART, changes)
    with autoscaling_cluster(folder) as (address, url):
        run_job("prepare", changes, os.environ)
        samples: list[Sample] = []
        began = time.monotonic()

        def look() -> None:
            seen = count_alive(url)
            if seen is None:
                return
            second = round(time.monotonic() - began, 1)
            samples.append(Sample(second, *seen, rows_left(experiment)))
            if len(samples) == 1 or samples[-2].size != samples[-1].size:
                print(samples[-1], flush=True)

        look()
        log = folder / "label.log"
        with log.open("w") as output:
            label = subprocess.Popen(
                command("label", changes),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": address},
            )
        try:
            while label.poll() is None:
                time.sleep(_SECONDS_BETWEEN_SAMPLES)
                look()
        finally:
            label.terminate()
            label.wait(timeout=60)
        ended = time.monotonic() - began
        if label.returncode != 0:
            raise ClusterError(f"the labelling failed: {log.read_text()[-2000:]}")
        while samples[-1].nodes > 1 and time.monotonic() < began + ended + _SHRINK_TIMEOUT_S:
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
            look()
    return samples, ended


def command(verb: str, changes: list[str]) -> list[str]:
    """Return the command line of a job."""
    return [sys.executable, str(JOBS / f"{verb}.py"), str(QUICKSTART), *changes]


def run_job(verb: str, changes: list[str], environment: Mapping[str, str]) -> None:
    """Run a job to its end."""
    done = subprocess.run(
        command(verb, changes), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ClusterError(f"jobs/{verb}.py failed: {done.stderr[-2000:]}")


@styled
def plot(samples: list[Sample], ended: float) -> Figure:
    """Draw nodes, teachers and rows left over time."""
    seconds = [sample.second for sample in samples]
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.step(
        seconds, [sample.nodes for sample in samples], where="post", color=SERIES[0], label="nodes"
    )
    above.step(
        seconds,
        [sample.teachers for sample in samples],
        where="post",
        color=SERIES[1],
        linestyle="--",
        label="teachers",
    )
    above.set_title("Nodes of the cluster and teachers on them")
    above.set_ylim(0, NODES + 0.5)
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    above.legend(loc="upper left")
    below.plot(seconds, [sample.rows_left for sample in samples], color=SERIES[2])
    below.set_title("Rows that wait for their label")
    below.set_ylim(bottom=0)
    below.set_xlabel("seconds since the labelling began; the line marks its end")
    for axes in (above, below):
        axes.axvline(ended, color=SERIES[7], linewidth=1.0)
    return figure


def measure(out: Path | None, *, scripted: bool) -> dict[str, Any]:
    """Run the show and say what was seen.

    Raises:
        ClusterError: Too little memory is free, the cluster did not start, or a job failed.
    """
    free_gib = psutil.virtual_memory().available / 2**30
    if not scripted and free_gib < _ENGINES_GIB:
        raise ClusterError(
            f"{NODES} engines need {_ENGINES_GIB} GiB of free memory, and {free_gib:.1f} are free; "
            "close what takes it, or look at the cluster alone with --quick"
        )
    # The path of a socket has to be short, so not below a folder that the user chose.
    with tempfile.TemporaryDirectory(prefix="llkd-", ignore_cleanup_errors=True) as folder:
        samples, ended = watch(Path(folder), scripted=scripted)
    most = max(sample.nodes for sample in samples)
    result = {
        "teacher": "scripted, no LLM" if scripted else "LLM",
        "nodes_start": samples[0].nodes,
        "nodes_max": most,
        "nodes_end": samples[-1].nodes,
        "teachers_max": max(sample.teachers for sample in samples),
        "seconds_up": next(sample.second for sample in samples if sample.nodes == most),
        "seconds_down": round(samples[-1].second - ended, 1),
        "seconds_labelling": round(ended, 1),
        "rows": samples[0].rows_left,
        "rows_left": samples[-1].rows_left,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "autoscaling.png").write_bytes(to_png(plot(samples, ended)))
        seen = {**result, "samples": [asdict(sample) for sample in samples]}
        (out / "autoscaling.json").write_text(json.dumps(seen, indent=2) + "\n")
    return result


def main() -> int:
    parser = figures.parser_of(__doc__, "a scripted teacher instead of the LLM: the cluster alone")
    parser.add_argument("--out", type=Path, help="folder for autoscaling.png and autoscaling.json")
    arguments = parser.parse_args()
    # Its nodes, its jobs and this process have to agree; the cluster is of this machine alone.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ended from outside, it ends its cluster too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return figures.run(lambda: measure(arguments.out, scripted=arguments.quick))


if __name__ == "__main__":
    sys.exit(main())
