"""What does each fault cost that a cluster can meet?

The cluster is Ray on three hosts of this machine (hosts.py): a head, which computes nothing, and
two workers of one CPU. On it the LLM labels, or a student trains on both workers, or it is served
by two replicas, and in the middle of that something happens, every time on a new cluster:

- `driver`, `actor`, `train-worker`, `replica`, `proxy`: that process is killed with SIGKILL;
- `raylet`: all that runs on a worker host is, and the host is started again;
- `network`: a worker host is cut off for 30 s;
- `head`: the head's host dies, and so the cluster; it is started again, and the job as well;
- `head-with-redis`: it finds in Redis what it knew;
- `disk-full`: nothing can be written any more; after the job has given up, room is made;
- `store-refuses`: the object store that all is kept in answers 503 to everything for 30 s.

`lost` and `doubled` are rows: without a label or with two, counted against the corpus, or, in
training, missing in an epoch or twice in it, counted against the labels; a training must also end
with the weights, to the bit, of one that nothing happened to. The labels it trains on are scripted,
which spares an LLM. `failed` are requests that were not answered with predictions; `under way` were
so many when it happened. They come six a second to the hosts in turn, and go to the next where
nobody listens, as behind a load balancer. `recovered` is when the ledger had more new answers than
the teacher may have had in hand, training its next checkpoint, the endpoint its replicas and a
proxy on the head and on every host that has one of them, which is where Serve has proxies; what has
to be started again is started here, at once. The disk is no part of the network that is cut. What
went into the store is counted as it stands there.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import figures
import hosts
import psutil
from scenes import (
    RECOVERY_TIMEOUT_S,
    TRAINING,
    Fault,
    LabellingScene,
    Outcome,
    Scene,
    ServingScene,
    StoredLabellingScene,
    TrainingScene,
)
from watched import Training

from llkd_ray.errors import ClusterError

_OUTAGE_S = 30.0
_NEWS_S = 15.0
_POLL_S = 0.2
_SMALL_DISK_MB = 64


def driver(scene: Scene) -> Iterator[None]:
    """The job's own process is killed; it is run again."""
    scene.job.kill()
    yield
    scene.job.start()


def process(scene: Scene) -> Iterator[None]:
    """A process that does the work is killed: a teacher's actor, a training worker, a replica."""
    _kill(scene.victim()[1])
    yield


def proxy(scene: Scene) -> Iterator[None]:
    """The proxy of one host is killed."""
    _kill(scene.cluster.workers[0].processes("ray::ProxyActor")[0])
    yield


def raylet(scene: Scene) -> Iterator[None]:
    """A host that does the work dies with all that runs on it; it is started again."""
    host, _ = scene.victim()
    host.kill()
    yield
    scene.cluster.start(host)


def network(scene: Scene) -> Iterator[None]:
    """A host that does the work is cut off for 30 s; given up in the meantime, it is started again.

    A raylet that was given up ends when it hears of it, some time after it is back.
    """
    host, _ = scene.victim()
    host.cut()
    yield
    time.sleep(_OUTAGE_S)
    host.mend()
    deadline = time.monotonic() + _NEWS_S
    while (known := scene.cluster.knows(host)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    scene.seen.append(f"the host was {'never given up' if known else 'given up'}")
    if not known:
        host.kill()
        scene.cluster.start(host)


def head(scene: Scene) -> Iterator[None]:
    """The head dies, and with it the cluster; it is started again, and the job as well."""
    scene.cluster.head.kill()
    yield
    for host in scene.cluster.workers:
        host.kill()
    for host in scene.cluster.hosts:
        scene.cluster.start(host)
    scene.job.start()


def head_with_redis(scene: Scene) -> Iterator[None]:
    """The head dies; it is started again and finds in Redis what it knew."""
    scene.cluster.head.kill()
    yield
    scene.cluster.start(scene.cluster.head)


def disk_full(scene: Scene) -> Iterator[None]:
    """The disk with the run is full; when the job has given up, room is made and it is run again.

    Raises:
        ClusterError: The job did not say in one line what to do.
    """
    filler = Path(scene.job.experiment.runs) / "filler"
    _fill(filler)
    yield
    assert scene.job.process is not None
    status = scene.job.process.wait(RECOVERY_TIMEOUT_S)
    last = scene.job.said().splitlines()[-1]
    if status != 1 or not last.startswith("error: no space") or "Traceback" in scene.job.said():
        raise ClusterError(f"on a full disk the job ended with {status}: {scene.job.said()}")
    filler.unlink()
    scene.job.start()


def store_refuses(scene: StoredLabellingScene) -> Iterator[None]:
    """The object store refuses for 30 s whatever it is asked."""
    scene.store.flag.touch()
    yield
    time.sleep(_OUTAGE_S)
    scene.store.flag.unlink()
    scene.seen.append(f"{scene.store.refused} requests refused")


def _kill(victim: psutil.Process) -> None:
    victim.kill()
    hosts.wait_for_end([victim])


def _fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _no_small_disk() -> str | None:
    if os.geteuid() != 0:
        return "only root can mount a small disk"
    with _scratch() as folder:
        try:
            with small_disk(Path(folder)):
                return None
        except subprocess.CalledProcessError as error:
            return f"no disk can be mounted here: {error}"


def _no_moto() -> str | None:
    return None if importlib.util.find_spec("moto") else "there is no S3 server here (pip: moto)"


def _no_redis() -> str | None:
    return None if shutil.which("redis-server") else "there is no redis-server here"


FAULTS = (
    Fault("driver", LabellingScene, driver),
    Fault("actor", LabellingScene, process),
    Fault("train-worker", TrainingScene, process),
    Fault("replica", ServingScene, process),
    Fault("proxy", ServingScene, proxy, impossible=hosts.namespaces_missing),
    Fault("raylet", LabellingScene, raylet),
    Fault("raylet", TrainingScene, raylet),
    Fault("raylet", ServingScene, raylet, impossible=hosts.namespaces_missing),
    Fault("network", LabellingScene, network, impossible=hosts.namespaces_missing),
    Fault("network", TrainingScene, network, impossible=hosts.namespaces_missing),
    Fault("network", ServingScene, network, impossible=hosts.namespaces_missing),
    Fault("head", LabellingScene, head),
    Fault(
        "head-with-redis",
        ServingScene,
        head_with_redis,
        functools.partial(hosts.cluster, with_redis=True),
        impossible=lambda: hosts.namespaces_missing() or _no_redis(),
    ),
    Fault("disk-full", LabellingScene, disk_full, impossible=_no_small_disk),
    Fault(
        "store-refuses",
        StoredLabellingScene,
        store_refuses,
        functools.partial(hosts.cluster, with_store=True),
        impossible=_no_moto,
    ),
)
QUICK = ("train-worker", "replica")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of a few megabytes on a folder, for root."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK_MB}m", "llkd", str(folder)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Ground:
    """What scenes are set on: a folder, and what was made in peace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, fault: Fault) -> Outcome:
        """Let a fault happen on a cluster of its own."""
        with contextlib.ExitStack() as stack:
            # Sockets of Ray stand below it, so its path is short.
            folder = Path(stack.enter_context(_scratch()))
            runs = folder / "runs"
            runs.mkdir()
            if fault.happen is disk_full:
                stack.enter_context(small_disk(runs))
            scene: Callable[[hosts.Cluster], Scene]
            if issubclass(fault.scene, LabellingScene):
                scene = functools.partial(fault.scene, runs=runs)
            elif fault.scene is TrainingScene:
                scene = functools.partial(TrainingScene, runs=runs, unbroken=self.unbroken)
            else:
                scene = functools.partial(ServingScene, runs=self.unbroken.lineage.run.parent)
            return scene(stack.enter_context(fault.cluster(folder))).through(fault)

    @functools.cached_property
    def unbroken(self) -> Training:
        """A training that nothing happens to; its student is what is served."""
        training = Training(self._folder / "runs", "unbroken", TRAINING)
        (self._folder / "runs").mkdir()
        for verb in ("prepare", "label"):
            training.before(verb)
        training.start()
        training.wait()
        print("trained once in peace", flush=True)
        return training


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="llkd-", ignore_cleanup_errors=True)


def measure(names: Sequence[str]) -> dict[str, Any]:
    """Let faults happen, one after the other.

    Raises:
        ClusterError: One was not survived; the others have happened nonetheless.
    """
    missing = hosts.namespaces_missing()
    if missing:
        print(f"hosts are addresses of the loopback: {missing}", flush=True)
    outcomes: list[Outcome] = []
    failed: list[str] = []
    with _scratch() as folder:
        ground = Ground(Path(folder))
        for fault in (fault for fault in FAULTS if fault.name in names):
            title = f"{fault.name} while {fault.scene.during}"
            if reason := fault.impossible():
                print(f"{title}: left out, {reason}", flush=True)
                continue
            try:
                outcomes.append(ground.run(fault))
                print(f"{title}: {outcomes[-1]}", flush=True)
            except Exception as error:  # noqa: BLE001 - the others are to be measured nonetheless
                failed.append(title)
                print(f"{title}: {type(error).__name__}: {error}", flush=True)
    header = ["fault", "during", "lost", "doubled", "failed", "recovered s", "seen"]
    print(figures.table(header, [list(asdict(outcome).values()) for outcome in outcomes]))
    if failed:
        raise ClusterError(f"not survived: {', '.join(failed)}")
    return {"faults": [asdict(outcome) for outcome in outcomes]}


def main() -> int:
    parser = figures.parser_of(__doc__, f"{', '.join(QUICK)} alone, within four minutes")
    names = list(dict.fromkeys(fault.name for fault in FAULTS))
    parser.add_argument("--faults", nargs="+", choices=names, default=names, help="these alone")
    arguments = parser.parse_args()
    # The hosts and this process have to agree; the cluster is of this machine alone.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ended from outside, it ends its hosts too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return figures.run(lambda: measure(QUICK if arguments.quick else arguments.faults))


if __name__ == "__main__":
    sys.exit(main())
