"""Several hosts on one machine, and a Ray cluster on them, to see what becomes of it without one.

As root, a host is a network namespace with an address of its own, behind a bridge that only this
machine knows, so that it can be cut off from the others. Without root it is an address of the
loopback, and cannot. The disk is one for all: the shared folder that a cluster needs.
"""

import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import s3_server

from llkd_ray.errors import ClusterError

GCS_PORT = 6379
DASHBOARD_PORT = 8265
_AGENT_PORT = 52365
_REDIS_PORT = 6400
_STORE_PORT = 9000
BUCKET = "llkd"
_STORE_BYTES = 100_000_000
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 30.0
_POLL_S = 0.2
_DEVICE = "eth0"


def namespaces_missing() -> str | None:
    """Return why there can be no network namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if shutil.which("ip") is None:
        return "there is no `ip` here (Debian: apt-get install iproute2)"
    # By making one: root in a container may list them and make none.
    for verb in ("add", "delete"):
        command = ["ip", "netns", verb, f"llkd-try-{os.getpid()}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip()
    return None


@dataclass
class Host:
    """One of them, and what runs on it."""

    number: int
    """0 for the one with Ray's head."""
    address: str
    namespace: str | None
    """None on the loopback."""
    folder: Path
    """For Ray's sockets and logs."""
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    """What was started on it by `start`."""

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a process on the host; it writes to the end of a log.

        Args:
            command: The program and its arguments.
            log: Takes what it prints.
            environment: Variables beside those of this process.
        """
        enter = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*enter, *command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._environment(), **(environment or {})},
            )
        self.started.append(process)
        return process

    def _environment(self) -> dict[str, str]:
        # Names of hosts are resolved by nobody here, so gloo is told which way leads to the others.
        return {"GLOO_SOCKET_IFNAME": _DEVICE if self.namespace else "lo"}

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Return the processes on the host whose command line has the title in it."""
        if self.namespace:
            pids = map(int, _ip("netns", "pids", self.namespace).split())
            found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        else:
            live = [psutil.Process(each.pid) for each in self.started if each.poll() is None]
            found = [*live, *(child for each in live for child in each.children(recursive=True))]
        return [process for process in found if title in _command_line(process)]

    def kill(self) -> None:
        """End all that runs on the host, at once and without a word, as a power cut would."""
        # What is started meanwhile is found by another look.
        while found := [process for process in self.processes() if lives(process)]:
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            wait_for_end(found)
        for process in self.started:
            process.wait()
        self.started.clear()

    def cut(self) -> None:
        """Take the host off the network."""
        self._link("down")

    def mend(self) -> None:
        """Put the host back on the network."""
        self._link("up")

    def _link(self, state: str) -> None:
        assert self.namespace is not None, "a host on the loopback cannot be cut off"
        _ip("link", "set", self.namespace, state)


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """Make hosts, and remove them with all that runs on them.

    Args:
        count: How many.
        folder: For what Ray leaves; its path is to be short, since sockets stand below it.
    """
    with contextlib.ExitStack() as stack:
        apart = namespaces_missing() is None
        places = _namespaces if apart else _loopback
        made = stack.enter_context(places(count))
        there = [
            Host(number, address, namespace, folder / f"host-{number}")
            for number, (address, namespace) in enumerate(made)
        ]
        for host in there:
            stack.callback(host.kill)
        yield there


@contextlib.contextmanager
def _loopback(count: int) -> Iterator[list[tuple[str, str | None]]]:
    yield [(f"127.0.0.{2 + number}", None) for number in range(count)]


@contextlib.contextmanager
def _namespaces(count: int) -> Iterator[list[tuple[str, str | None]]]:
    """Make namespaces behind a bridge; yield the address and the name of each.

    The machine's end of a namespace's cable bears the name of the namespace.
    """
    net = _free_net()
    us, *addresses = [str(address) for address in list(net.hosts())[: count + 1]]
    names = [f"llkd{os.getpid()}-{number}" for number in range(count)]
    bridge = f"llkd{os.getpid()}"
    with contextlib.ExitStack() as stack:
        stack.callback(_ip, "link", "delete", bridge)
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{us}/{net.prefixlen}", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for name, address in zip(names, addresses, strict=True):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", _DEVICE, "netns", name)
            # A namespace outlives its name for a moment; its cable is not to.
            stack.callback(_ip, "link", "delete", name)
            _ip("link", "set", name, "master", bridge, "up")
            _ip("-n", name, "address", "add", f"{address}/{net.prefixlen}", "dev", _DEVICE)
            _ip("-n", name, "link", "set", _DEVICE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            # Leads nowhere; Ray finds a host's own address by the way to some other one.
            _ip("-n", name, "route", "add", "default", "dev", _DEVICE)
        yield [*zip(addresses, names, strict=True)]


def _free_net() -> ipaddress.IPv4Network:
    """Return a net of private addresses in which this machine has none."""
    taken = [
        ipaddress.ip_address(address.address)
        for device in psutil.net_if_addrs().values()
        for address in device
        if address.family.name == "AF_INET"
    ]
    nets = (ipaddress.IPv4Network(f"10.77.{number}.0/24") for number in range(256))
    return next(net for net in nets if not any(address in net for address in taken))


def _ip(*arguments: str) -> str:
    """Run iproute2's `ip` and return what it prints.

    Raises:
        ClusterError: It has failed.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Store:
    """A server that speaks S3, with a bucket."""

    url: str
    flag: Path
    """While this file is there, it refuses whatever it is asked."""
    log: Path
    """A line for every request that was refused."""

    @property
    def refused(self) -> int:
        """Requests refused so far."""
        return self.log.read_text(encoding="utf-8").count("refused ")


@dataclass
class Cluster:
    """Ray on hosts: the head, which computes nothing, and workers of one CPU each."""

    hosts: list[Host]
    redis: str | None = None
    """Address of the Redis in which the head keeps what it knows, to find it again."""
    store: "Store | None" = None
    """An object store on a host of its own."""

    @property
    def head(self) -> Host:
        """The host whose Ray knows the others."""
        return self.hosts[0]

    @property
    def workers(self) -> list[Host]:
        """The others."""
        return self.hosts[1:]

    @property
    def address(self) -> str:
        """Where to join it."""
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        """URL to ask about it."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def run(self, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        """Start a job on the head; it writes to the end of a log."""
        return self.head.start(command, log, {"RAY_ADDRESS": self.address})

    def start(self, host: Host) -> None:
        """Start Ray on a host that has none, and wait until the head knows it.

        Raises:
            ClusterError: It did not start.
        """
        role = ["--num-cpus", "1", "--address", self.address]
        environment = {
            # Teachers on CPUs would suffer from Ray's own default of 15.
            "RAY_worker_niceness": "0",
            # As every cluster definition has it: a request whose replica dies is sent again.
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "llkd_ray.serving.ingress.middlewares",
        }
        if host is self.head:
            role = ["--head", "--num-cpus", "0", "--port", str(GCS_PORT), "--redis-password", ""]
            role += ["--dashboard-host", host.address, "--dashboard-port", str(DASHBOARD_PORT)]
            if self.redis:
                environment["RAY_REDIS_ADDRESS"] = self.redis
        ray = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role),
            *("--disable-usage-stats", "--node-ip-address", host.address),
            *("--object-store-memory", str(_STORE_BYTES), "--temp-dir", str(host.folder)),
            *("--dashboard-agent-listen-port", str(_AGENT_PORT + host.number)),
        ]
        # What a head that was killed has left there would tell `ray start` that it runs already,
        # for the other hosts' raylets, which name its address, are seen from here.
        shutil.rmtree(host.folder, ignore_errors=True)
        log = host.folder.with_suffix(".log")
        started = host.start(ray, log, environment)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.knows(host):
            if started.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(encoding="utf-8", errors="replace")
                raise ClusterError(f"Ray did not start on {host.address}: {said[-2000:]}")
            time.sleep(_POLL_S)

    def knows(self, host: Host) -> bool:
        """Tell whether the head holds a host for alive."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        try:
            # What the filter leaves out counts as missing, which would be an error.
            nodes = list_nodes(
                self.dashboard,
                filters=[("state", "=", "ALIVE")],
                timeout=5,
                raise_on_missing_output=False,
            )
        except (RayStateApiException, ConnectionError):
            return False
        return host.address in {node.node_ip for node in nodes}


@contextlib.contextmanager
def cluster(
    folder: Path, count: int = 3, *, with_redis: bool = False, with_store: bool = False
) -> Iterator[Cluster]:
    """Hold a Ray cluster on so many hosts.

    Args:
        folder: For what Ray leaves; its path is to be short.
        count: Hosts, the head among them.
        with_redis: Have the head keep what it knows in a Redis, on a host of its own.
        with_store: Have an object store, on a host of its own; all that is started meanwhile, and
            this process, finds it by its environment.
    """
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(hosts(count + with_redis + with_store, folder))
        made = Cluster(there[:count])
        if with_redis:
            made.redis = _start_redis(there[count])
        if with_store:
            made.store = stack.enter_context(_store_on(there[-1]))
        for host in made.hosts:
            made.start(host)
        yield made


def _start_redis(host: Host) -> str:
    """Start a Redis that writes nothing to the disk; return its address."""
    program = shutil.which("redis-server")
    if program is None:
        raise ClusterError("there is no redis-server here (Debian: apt-get install redis-server)")
    options = ["--bind", host.address, "--port", str(_REDIS_PORT), "--protected-mode", "no"]
    host.start([program, *options, "--save", ""], host.folder.with_suffix(".log"))
    return f"{host.address}:{_REDIS_PORT}"


@contextlib.contextmanager
def _store_on(host: Host) -> Iterator[Store]:
    """Start an object store; the environment leads to it for the length of the block."""
    store = Store(
        url=f"http://{host.address}:{_STORE_PORT}",
        flag=host.folder.with_suffix(".refuses"),
        log=host.folder.with_suffix(".log"),
    )
    program = [sys.executable, s3_server.__file__, host.address, str(_STORE_PORT), BUCKET]
    started = host.start([*program, str(store.flag)], store.log)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _listens(host.address, _STORE_PORT):
        if started.poll() is not None or time.monotonic() > deadline:
            raise ClusterError(f"the store did not start: {store.log.read_text('utf-8')[-2000:]}")
        time.sleep(_POLL_S)
    before = dict(os.environ)
    os.environ.update(s3_server.environment(store.url))
    try:
        yield store
    finally:
        os.environ.clear()
        os.environ.update(before)


def _listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_for_end(processes: Sequence[psutil.Process]) -> None:
    """Wait until processes have ended; nobody may have asked for their status yet."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that has ended may wait to be asked for its status."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
