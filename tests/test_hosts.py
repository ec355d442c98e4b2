"""The hosts that the benchmark of faults makes on this machine, and how it counts rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

import hosts
import watched

namespaces = pytest.mark.skipif(
    hosts.namespaces_missing() is not None, reason=str(hosts.namespaces_missing())
)
# Answers one connection with a word.
_LISTEN = "import socket; s = socket.create_server(('', 7000)); s.accept()[0].sendall(b'here')"


def ask(asking: hosts.Host, asked: hosts.Host, log: Path) -> str:
    command = (
        f"import socket; print(socket.create_connection(('{asked.address}', 7000), 2).recv(9))"
    )
    log.unlink(missing_ok=True)
    asking.start([sys.executable, "-c", command], log).wait(timeout=30)
    return log.read_text()


def listening(host: hosts.Host, log: Path) -> None:
    host.start([sys.executable, "-c", _LISTEN], log)


def network() -> set[str]:
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in (links.stdout + spaces.stdout).splitlines()}


@namespaces
def test_hosts_hear_each_other_unless_one_is_cut_off(tmp_path: Path) -> None:
    with hosts.hosts(2, tmp_path) as (one, other):
        assert one.address != other.address
        listening(other, tmp_path / "listening")
        for _ in range(50):
            if "here" in (heard := ask(one, other, tmp_path / "asking")):
                break
        assert "here" in heard
        listening(other, tmp_path / "listening")
        other.cut()
        assert "here" not in ask(one, other, tmp_path / "asking")
        other.mend()
        for _ in range(50):
            if "here" in (heard := ask(one, other, tmp_path / "asking")):
                break
        assert "here" in heard


@namespaces
def test_hosts_leave_neither_network_nor_processes(tmp_path: Path) -> None:
    before = network()
    with hosts.hosts(2, tmp_path) as there:
        assert network() > before
        # One that has left its parent stays on its host.
        sleeping = there[0].start(["sh", "-c", "setsid sleep 1000 & sleep 1000"], tmp_path / "log")
        while len(there[0].processes("sleep")) < 3:
            pass
        processes = there[0].processes()
    assert sleeping.poll() == -9
    assert network() == before
    assert not any(map(hosts.lives, processes))


def test_without_namespaces_hosts_are_addresses_of_the_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in str(hosts.namespaces_missing())
    with hosts.hosts(2, tmp_path) as (one, other):
        assert [one.address, other.address] == ["127.0.0.2", "127.0.0.3"]
        sleeping = one.start(["sleep", "1000"], tmp_path / "log")
        assert [process.pid for process in one.processes("sleep")] == [sleeping.pid]
        assert other.processes() == []
    assert sleeping.wait() == -9


def test_rows_are_lost_and_doubled_by_their_ids() -> None:
    assert watched.lost_and_doubled(["a", "b", "c"], ["c", "a", "b"]) == (0, 0)
    assert watched.lost_and_doubled(["a", "b", "c"], ["a", "a", "a"]) == (2, 2)
