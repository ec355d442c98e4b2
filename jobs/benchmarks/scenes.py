"""What a fault happens to: jobs on a cluster of hosts, and what is counted of them."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hosts
import httpx
import psutil
import served
from watched import Job, Labelling, Training

from llkd_ray.errors import ClusterError

RECOVERY_TIMEOUT_S = 300.0
_POLL_S = 0.2
_ROWS = 240
_STRIKE_AFTER_ROWS = 64
_STRIKE_AFTER_CHECKPOINTS = 2
_REQUESTS_PER_S = 6.0
_REPLICAS = 2
_PORT = 8000

_SMALL = ("corpus.validation_fraction=0.02", "corpus.test_fraction=0.0")
TRAINING = (
    *_SMALL,
    "teacher.kind=scripted",
    "teacher.max_unlabeled_rows=256",
    'teacher.splits=["unlabeled"]',
    "train.epochs=4",
    "export.int8=false",
)
_SERVING = (
    *TRAINING,
    "serve.host=0.0.0.0",
    f"serve.port={_PORT}",
    f"serve.num_replicas={_REPLICAS}",
    "serve.cpus_per_replica=0.4",
    "serve.threads_per_replica=1",
    # A queue is another benchmark's matter (overload.py).
    "serve.max_queue_ms=60000.0",
)


@dataclass(frozen=True)
class Fault:
    """Something that happens, and what it happens to."""

    name: str
    scene: "type[Scene]"
    happen: Callable[[Any], Iterator[None]]
    """Yields once: before that the fault, after that what is done about it."""
    cluster: Callable[[Path], "contextlib.AbstractContextManager[hosts.Cluster]"] = hosts.cluster
    impossible: Callable[[], str | None] = lambda: None
    """Returns why it cannot be had here."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage that something happened to; None where there is no such thing."""

    fault: str
    during: str
    rows_lost: int | None
    rows_doubled: int | None
    requests_failed: int | None
    seconds_to_recover: float
    seen: str

    def __str__(self) -> str:
        costs = [
            f"{count} {what}"
            for count, what in (
                (self.rows_lost, "rows lost"),
                (self.rows_doubled, "doubled"),
                (self.requests_failed, "requests failed"),
            )
            if count is not None
        ]
        return f"{', '.join(costs)}, recovered after {self.seconds_to_recover} s; {self.seen}"


class Scene:
    """A job on a cluster that something is going to happen to."""

    during = ""
    titles: tuple[str, ...] = ()
    """Of the processes that do the work, on the workers."""

    def __init__(self, cluster: hosts.Cluster, job: Job) -> None:
        self.cluster = cluster
        self.job = job
        self.seen: list[str] = []
        """What is worth telling."""

    def progress(self) -> int:
        """Return how far the job is."""
        raise NotImplementedError

    def through(self, fault: "Fault") -> Outcome:
        """Let the fault happen in the middle of the job, and see it to its end."""
        raise NotImplementedError

    def strike(self, fault: "Fault") -> float:
        """Let the fault happen; return the seconds until the job goes on.

        Raises:
            ClusterError: It does not.
        """
        acts = fault.happen(self)
        next(acts)
        before, began = self.progress(), time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            mending = pool.submit(next, acts, None)
            while not self.goes_on(before):
                if mending.done():
                    mending.result()
                if time.monotonic() - began > RECOVERY_TIMEOUT_S:
                    raise ClusterError(
                        f"{fault.name}: {self.during} does not go on: {self.job.said()}"
                    )
                time.sleep(_POLL_S)
            seconds = time.monotonic() - began
            mending.result()
        return round(seconds, 1)

    def goes_on(self, before: int) -> bool:
        """Tell whether the job is further than it was."""
        return self.progress() > before

    def victim(self) -> tuple[hosts.Host, psutil.Process]:
        """Return a process that does the work, and its host.

        Raises:
            ClusterError: There is none.
        """
        for host in self.cluster.workers:
            for title in self.titles:
                for process in host.processes(title):
                    return host, process
        raise ClusterError(f"there is no {self.titles[0]} on the workers: {self.job.said()}")

    def outcome(
        self, fault: "Fault", rows: tuple[int, int] | None, failed: int | None, seconds: float
    ) -> Outcome:
        """Put together what was counted."""
        lost, doubled = rows or (None, None)
        seen = "; ".join(self.seen)
        return Outcome(fault.name, self.during, lost, doubled, failed, seconds, seen)


class LabellingScene(Scene):
    """The LLM labels."""

    during = "labelling"
    titles = ("ray::MapWorker(MapBatches(TeacherActor))",)

    def __init__(self, cluster: hosts.Cluster, runs: Path, changes: Sequence[str] = ()) -> None:
        engine = ("teacher.actors={num_cpus = 0.5}", "teacher.engine.cpu_kvcache_gib=1")
        changes = [*_SMALL, *engine, *changes]
        self.labelling = Labelling(runs, "labelling", _ROWS, cluster.run, changes)
        super().__init__(cluster, self.labelling)

    def progress(self) -> int:
        """Return the rows with an answer."""
        self.labelling.look()
        return len(self.labelling.answered)

    def goes_on(self, before: int) -> bool:
        """Tell whether more was answered than the teacher had in hand, or in front of it."""
        return self.progress() > before + 2 * self.labelling.held_rows

    def through(self, fault: "Fault") -> Outcome:
        """See `Scene`."""
        self.job.before("prepare")
        self.job.start()
        self.job.wait(lambda: self.progress() >= _STRIKE_AFTER_ROWS)
        seconds = self.strike(fault)
        self.job.wait()
        self.look_back()
        self.seen.append(f"{self.labelling.answered_again} rows answered again")
        return self.outcome(fault, self.labelling.lost_and_doubled(), None, seconds)

    def look_back(self) -> None:
        """Do what has to come between the job's end and the counting."""


class StoredLabellingScene(LabellingScene):
    """The LLM labels, and all that is kept is kept in an object store."""

    during = "labelling into a store"

    def __init__(self, cluster: hosts.Cluster, runs: Path) -> None:
        assert cluster.store is not None
        self.store = cluster.store
        self._cache = runs.with_name("cache")
        store = [f"runs=s3://{hosts.BUCKET}/runs", f"cache={self._cache}"]
        super().__init__(cluster, runs, store)

    def look_back(self) -> None:
        """Drop the mirror, which is no proof of what is in the store."""
        shutil.rmtree(self._cache)


class TrainingScene(Scene):
    """A student trains on both workers."""

    during = "training"
    titles = ("RayTrainWorker",)

    def __init__(self, cluster: hosts.Cluster, runs: Path, unbroken: Training) -> None:
        self.training = Training(runs, "broken", TRAINING, cluster.run)
        super().__init__(cluster, self.training)
        self._unbroken = unbroken

    def progress(self) -> int:
        """Return the checkpoints written."""
        self.training.look()
        return self.training.checkpoints

    def through(self, fault: "Fault") -> Outcome:
        """See `Scene`."""
        run = self.training.lineage.run
        shutil.rmtree(run, ignore_errors=True)
        students = shutil.ignore_patterns("student-*", "onnx-*", ".*")
        shutil.copytree(self._unbroken.lineage.run, run, ignore=students)
        self.job.start()
        self.job.wait(lambda: self.progress() >= _STRIKE_AFTER_CHECKPOINTS)
        seconds = self.strike(fault)
        self.job.wait()
        ours, theirs = (
            (training.student / "model/model.safetensors").read_bytes()
            for training in (self.training, self._unbroken)
        )
        if ours != theirs:
            raise ClusterError(f"{fault.name}: the weights are not those of an unbroken training")
        self.seen.append("the same weights")
        return self.outcome(fault, self.training.lost_and_doubled(), None, seconds)


class ServingScene(Scene):
    """The student is served by two replicas, under load."""

    during = "serving"
    titles = served.REPLICA

    def __init__(self, cluster: hosts.Cluster, runs: Path) -> None:
        changes = [f"runs={runs}", "name=unbroken", *_SERVING]
        super().__init__(cluster, Job("serve", changes, runs.with_name("serving.log"), cluster.run))
        # On the loopback all hosts have the same ports, so there the head alone has a proxy.
        fronts = cluster.hosts if cluster.head.namespace else cluster.hosts[:1]
        self._urls = [_url(host.address) for host in fronts]
        self._load = served.Load(*self._urls)

    def progress(self) -> int:
        """Return 1 where all that is to be there is there."""
        replicas = self._replicas()
        # Serve has a proxy on the head, and on a host that has a replica.
        hosts_of_proxies = {self.cluster.head.address, *(each["node_ip"] for each in replicas)}
        urls = set(self._urls).intersection(map(_url, hosts_of_proxies))
        return int(len(replicas) == _REPLICAS and all(map(_answers, urls)))

    def goes_on(self, before: int) -> bool:  # noqa: ARG002 - It is whole or it is not.
        """Tell whether all is there again."""
        return self.progress() == 1

    def through(self, fault: "Fault") -> Outcome:
        """See `Scene`."""
        self.job.start()
        self.job.wait(lambda: self.progress() == 1)
        answers, seconds = asyncio.run(
            self._load.during(_REQUESTS_PER_S, lambda: asyncio.to_thread(self._strike, fault))
        )
        failed = sum(answer.status != served.OK for answer in answers)
        slowest_s = (served.percentile(answers, 100) or 0.0) / 1000
        self.seen.append(f"{served.statuses(answers)}, slowest {slowest_s:.1f} s")
        return self.outcome(fault, None, failed, seconds)

    def _strike(self, fault: "Fault") -> float:
        while not self._load.under_way:
            time.sleep(0.001)
        self.seen.append(f"{self._load.under_way} under way")
        return self.strike(fault)

    def _replicas(self) -> list[Any]:
        """Return what Serve says of the replicas that run, and that indeed live."""
        from llkd_ray.serving.deploy import APP

        with contextlib.suppress(httpx.HTTPError, KeyError):
            url = f"{self.cluster.dashboard}/api/serve/applications/"
            told = httpx.get(url, timeout=2.0, trust_env=False).json()
            # One, or none yet.
            deployments = told["applications"][APP]["deployments"].values()
            return [
                replica
                for deployment in deployments
                for replica in deployment["replicas"]
                if replica["state"] == "RUNNING" and _lives(replica["pid"])
            ]
        return []


def _url(address: str) -> str:
    return f"http://{address}:{_PORT}"


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return hosts.lives(psutil.Process(pid))
    return False


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", timeout=2.0, trust_env=False).is_success
    return False
