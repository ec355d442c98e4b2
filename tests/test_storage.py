"""Runs in an object store: a real server on loopback, spoken to by pyarrow's S3 client."""

import contextlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, ROOT, SMALL, Run, command

from llkd_ray import storage
from llkd_ray.artifacts import MANIFEST, Artifact, Rows, hand_over, make
from llkd_ray.config import load_experiment
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ArtifactError, ConfigError, StorageError
from llkd_ray.standing import leftovers, remove, standings
from llkd_ray.teacher.answers import CONTENT_FREE
from llkd_ray.teacher.ledger import Ledger, range_name

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

import autoscaling
from s3_server import CREDENTIALS, environment, front_of, s3_server

BUCKET = "bucket"
NODES = ("here", "there")

# `artifact` and `fill`, in a process of its own.
_MAKER = """
import sys
from pathlib import Path
from llkd_ray import storage
from llkd_ray.artifacts import Artifact, Rows, make

run = storage.folder_of(*sys.argv[1:3]) / "name"
made = Artifact(run=run, noun="labels", job="label", settings={}, inputs={"corpus": "c1"})
with make(made) as draft:
    for name in sys.argv[3:]:
        (draft.folder / name).parent.mkdir(exist_ok=True)
        (draft.folder / name).write_text(name)
    draft.rows = Rows(taken=1, kept=1, rejected=0)
print(made.made)
"""


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with s3_server(BUCKET) as url:
        yield url


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment in which stores are found."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def runs(s3: str, tmp_path: Path) -> str:
    """The URI of runs that no other test sees, with what a URI need not escape here."""
    assert s3
    return f"s3://{BUCKET}/{tmp_path.name}/runs of 100 % ä"


def artifact(runs: str, cache: Path, **settings: int) -> Artifact:
    """An artifact as a node sees it whose cache is this folder."""
    return Artifact(
        run=storage.folder_of(runs, str(cache)) / "name",
        noun="labels",
        job="label",
        settings=settings,
        inputs={"corpus": "c1"},
    )


def fill(one: Artifact, *names: str) -> None:
    with make(one) as draft:
        for name in names:
            (draft.folder / name).parent.mkdir(exist_ok=True)
            (draft.folder / name).write_text(name)
        draft.rows = Rows(taken=1, kept=1, rejected=0)


def maker(url: str, runs: str, cache: Path, *names: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _MAKER, runs, str(cache), *names],
        cwd=Path(__file__).parent,
        env=environment(url),
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(come_true: Callable[[], bool], most_s: float = 120) -> None:
    until = time.monotonic() + most_s
    while not come_true():
        assert time.monotonic() < until
        time.sleep(0.2)


def stored(one: Artifact) -> set[str]:
    return {file.name for file in storage.files(one.path)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_a_folder(tmp_path: Path) -> None:
    assert storage.folder_of(str(tmp_path), "cache") == tmp_path
    assert storage.folder_of(f"file://{tmp_path}/a%20b", "cache") == tmp_path / "a b"
    assert not storage.in_store(tmp_path)
    assert storage.address(tmp_path) == str(tmp_path)
    assert storage.here(tmp_path) == tmp_path


def test_a_sign_in_a_key_is_no_secret() -> None:
    source = "s3://bucket/data@v2/x.parquet"
    assert load_experiment(QUICKSTART, [f"corpus.source={source}"]).corpus.source == source


def test_a_path_of_a_mirror_says_what_it_stands_for(tmp_path: Path) -> None:
    folder = storage.folder_of("gs://bucket/runs/", str(tmp_path))
    assert folder.is_relative_to(tmp_path)
    assert storage.address(folder / "name/labels-1") == "gs://bucket/runs/name/labels-1"
    assert storage.entry_of(folder / "name/labels-1/a/b") == folder / "name/labels-1"
    assert storage.entry_of(folder / "name/labels-1") == folder / "name/labels-1"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("runs=s3://key:hush/hush@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        ("runs=s3://hush@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        ("corpus.source=S3://key:hush@bucket/x.parquet", "AWS_SECRET_ACCESS_KEY"),
        ("corpus.source=s3://key:hush@bucket/texts", "corpus.source: this URI names credentials"),
        ("runs=s3://bucket/runs?endpoint_override=hush", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_uri_with_secrets_is_refused_and_not_repeated(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(QUICKSTART, [override])
    assert told in str(caught.value)
    assert "hush" not in str(caught.value)
    load_experiment(QUICKSTART, ["runs=abfss://container@account/runs"])


def test_an_artifact_is_there_for_every_node_once_its_manifest_is(
    runs: str, tmp_path: Path
) -> None:
    made, seen = (artifact(runs, tmp_path / node) for node in NODES)
    fill(made, "a", "split/b", "split/c d")
    assert seen.made
    assert str(seen) == f"{runs}/name/{seen.path.name}"
    assert not seen.path.exists()
    assert contents(seen.require().path) == contents(made.path)
    assert stored(made) == {"a", "split/b", "split/c d", MANIFEST}
    assert storage.files(made.making) == []


def test_a_mirror_does_not_claim_what_the_store_has_lost(runs: str, tmp_path: Path) -> None:
    made, seen = (artifact(runs, tmp_path / node) for node in NODES)
    fill(made, "old")
    seen.require()
    storage.remove(made.path)
    assert (seen.path / "old").is_file()
    assert not seen.made
    fill(made, "new")
    assert contents(seen.require().path).keys() == {"new", MANIFEST}
    shutil.rmtree(tmp_path / "there")
    assert seen.made


def test_an_upload_that_is_killed_commits_nothing_and_is_taken_up_again(
    s3: str, runs: str, tmp_path: Path
) -> None:
    puts = itertools.count(1)

    def refuses_the_fourth(method: str, _path: str) -> bool:
        return method == "PUT" and next(puts) > 3

    here, there, third = (artifact(runs, tmp_path / node) for node in (*NODES, "third"))
    names = [f"file-{number}" for number in range(20)]
    with (
        front_of(s3, refuses_the_fourth) as front,
        maker(front, runs, tmp_path / "here", *names) as process,
    ):
        wait_for(lambda: len(stored(here)) == 3)
        process.kill()
    assert set(names) > stored(here)
    assert not there.made
    # What was whole on the killed process's node is not made again, only put there.
    assert here.made
    assert stored(here) == {*names, MANIFEST}
    assert contents(there.require().path) == contents(here.require().path)
    # Another node knows nothing of it, and what it leaves has no file of the killed one.
    storage.remove(here.path / MANIFEST)
    fill(third, "file-0", "other")
    assert stored(third) == {"file-0", "other", MANIFEST}


def test_two_makers_on_two_nodes_leave_a_whole_artifact(s3: str, runs: str, tmp_path: Path) -> None:
    names = [f"{number}/of many" for number in range(10)]
    processes = [maker(s3, runs, tmp_path / node, *names) for node in NODES]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert told == [["True"], ["True"]]
    made, seen = artifact(runs, tmp_path / "here"), artifact(runs, tmp_path / "third")
    assert stored(made) == {*names, MANIFEST}
    assert contents(seen.require().path) == contents(made.require().path)


def test_who_comes_second_does_not_take_away_what_the_first_has_made_whole(
    s3: str, runs: str, tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []
    at_it, may_go_on = threading.Event(), threading.Event()

    def holds_the_first_put(method: str, path: str) -> bool:
        asked.append((method, path))
        if method == "PUT":
            at_it.set()
            assert may_go_on.wait(60)
        return False

    made = artifact(runs, tmp_path / "here")
    with (
        front_of(s3, holds_the_first_put) as front,
        maker(front, runs, tmp_path / "there", "a", "b") as second,
    ):
        assert at_it.wait(60)
        fill(made, "a", "b")
        may_go_on.set()
        assert second.communicate(timeout=60)[0].split() == ["True"]
    assert ("PUT", "a") in {(method, path.rpartition("/")[2]) for method, path in asked}
    manifest = f"{made.path.name}/{MANIFEST}"
    assert not [path for method, path in asked if method == "DELETE" and path.endswith(manifest)]
    assert stored(made) == {"a", "b", MANIFEST}


def test_what_another_node_writes_reaches_the_maker(runs: str, tmp_path: Path) -> None:
    made, helper = (artifact(runs, tmp_path / node) for node in NODES)
    with make(made) as draft:
        for node, one in zip(NODES, (made, helper), strict=True):
            one.making.mkdir(parents=True, exist_ok=True)
            (one.making / node).write_text(node)
            hand_over(one.making / node)
        # The maker's own is put with all the others in the end.
        assert [file.name for file in storage.files(draft.folder)] == ["there"]
        storage.here(draft.folder)
        draft.rows = Rows(taken=1, kept=1, rejected=0)
    assert stored(made) == {*NODES, MANIFEST}
    assert storage.files(made.making) == []


def test_a_store_that_refuses_for_some_seconds_is_asked_again(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    until = time.monotonic() + 6

    def refuses(_method: str, path: str) -> bool:
        if time.monotonic() < until:
            refused.append(path)
            return True
        return False

    with front_of(server, refuses) as front:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": front}.items():
            monkeypatch.setenv(name, value)
        made = artifact(f"s3://{BUCKET}/refusing", tmp_path)
        fill(made, "a", "b")
        assert made.made
    assert time.monotonic() > until
    assert len(refused) > 1


def test_a_file_system_that_is_sent_elsewhere_is_opened_there_anew(
    runs: str, tmp_path: Path
) -> None:
    filesystem, path = storage.filesystem_of(artifact(runs, tmp_path).path)
    sent = pickle.dumps(filesystem)
    assert pickle.loads(sent) is filesystem  # noqa: S301 - our own.
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    assert path.startswith(f"{BUCKET}/")


def test_a_store_that_is_not_there_is_told_in_one_line(s3: str, tmp_path: Path) -> None:
    runs = "s3://no-such-bucket/runs"
    done = subprocess.run(
        command("prepare", str(QUICKSTART), f"runs={runs}", f"cache={tmp_path}"),
        env=environment(s3),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {runs}: ")
    assert "AWS_ENDPOINT_URL" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(StorageError, match="another URI that pyarrow"):
        storage.exists(storage.folder_of("ftps://host/runs", str(tmp_path)) / "name/x")


IDS = [f"{number:032x}" for number in range(0, 1 << 124, 1 << 117)]


def entries(ledger: Ledger, ids: list[str]) -> pa.Table:
    rows = [
        {"row_id": id_, "logprobs": [-1.0, -2.0], "attempt": 1}
        | dict.fromkeys(("prompt_tokens", "cached_tokens", "cut_tokens"), 0)
        for id_ in ids
    ]
    return pa.Table.from_pylist(rows, ledger.columns)


def test_a_ledger_is_one_for_all_nodes(runs: str, tmp_path: Path) -> None:
    here, there = (
        Ledger(storage.folder_of(runs, str(tmp_path / node)) / "name/ledger-1", 2) for node in NODES
    )
    here.open({"prompt": "p"})
    parts = range_name(IDS[0], IDS[-1])
    assert there.find(pa.array(IDS)).num_rows == 0
    there.write(parts, entries(there, IDS[10:20]))
    here.write(parts, entries(here, IDS[40:80]))
    expected = [*IDS[10:20], *IDS[40:80]]
    for ledger in (here, there):
        assert ledger.open_folders() == [parts]
        assert ledger.find(pa.array(IDS)).column("row_id").to_pylist() == expected
    here.compact(parts)
    for ledger in (here, there):
        assert ledger.open_folders() == []
        assert ledger.find(pa.array(IDS)).column("row_id").to_pylist() == expected
    told = [file.name for file in storage.files(here.folder)]
    assert len(told) == 2
    assert "identity.json" in told


def test_a_run_in_a_store_has_a_standing_and_is_cleaned(runs: str, tmp_path: Path) -> None:
    run, other = (
        Run((f"runs={runs}", f"cache={tmp_path / node}", *SMALL, *more))
        for node, more in (("here", ()), ("there", ("corpus.validation_fraction=0.3",)))
    )
    fill(run.lineage.corpus, "rows")
    fill(other.lineage.corpus, "rows")
    unfinished = run.lineage.labels.making
    unfinished.mkdir(parents=True)
    (unfinished / "part").write_text("part")
    storage.put(unfinished)
    for lineage in (run.lineage, Run((*run.overrides, f"cache={tmp_path / 'third'}")).lineage):
        states = {one.artifact.noun: one.state for one in standings(lineage)}
        assert [states[noun] for noun in ("corpus", "labels", "scores")] == [
            *("made", "unfinished", "not made")
        ]
    [leftover] = leftovers(run.lineage)
    assert leftover.path.name == other.lineage.corpus.path.name
    assert leftover.size_bytes > 100
    assert 0 <= leftover.age_s < 600
    remove(leftover)
    assert leftovers(run.lineage) == []
    assert not other.lineage.corpus.made
    assert run.lineage.corpus.made


def test_what_a_job_at_work_in_a_store_needs_is_not_left_over(runs: str, tmp_path: Path) -> None:
    run, other = (
        Run((f"runs={runs}", f"cache={tmp_path / 'here'}", *SMALL, *more)).lineage
        for more in ((), ("corpus.validation_fraction=0.3",))
    )
    fill(other.corpus, "rows")
    with make(other.labels) as draft:
        with pytest.raises(ArtifactError, match="a job with other settings is at work here"):
            leftovers(run)
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert {leftover.path.name for leftover in leftovers(run)} == {
        *(other.corpus.path.name, other.labels.path.name)
    }


@pytest.mark.slow
def test_labelling_that_is_killed_goes_on_from_another_node(
    s3: str, runs: str, tmp_path: Path
) -> None:
    overrides = (
        *(f"runs={runs}", *SMALL, "teacher.kind=scripted", "teacher.rows_per_s=40"),
        *("teacher.max_unlabeled_rows=400", "teacher.batch_size=8", "ray.num_cpus=2"),
    )
    here, there, third = (
        Run((*overrides, f"cache={tmp_path / node}")) for node in (*NODES, "third")
    )
    run_job(s3, here, "prepare")
    with subprocess.Popen(
        command("label", str(QUICKSTART), *here.overrides),
        cwd=ROOT,
        env=environment(s3),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_for(lambda: len(answered(third)) >= 100)
        os.killpg(process.pid, 9)
    # Its Ray notices, and ends too.
    wait_for(lambda: answered(third) == answered(third, after_s=3))
    before = len(answered(third))
    assert 100 <= before < 400
    assert not third.lineage.readouts.made
    run_job(s3, there, "label")
    # What had been written was not asked about again.
    lineage = third.lineage
    details = lineage.readouts.manifest().details
    assert details["answered_now"] == details["taken"] + len(CONTENT_FREE) - before
    assert details["duplicates"] == details["rejected"] == 0
    corpus, labels = (
        [
            id_
            for shard in read_shards(one.require().path / "unlabeled")
            for id_ in pq.read_table(shard, columns=["row_id"]).column("row_id").to_pylist()
        ]
        for one in (lineage.corpus, lineage.labels)
    )
    assert labels == corpus[:400]
    assert contents(lineage.labels.path) == contents(there.lineage.labels.path)


def run_job(url: str, run: Run, verb: str, *more: str) -> str:
    done = subprocess.run(
        command(verb, str(QUICKSTART), *run.overrides, *more),
        cwd=ROOT,
        env=environment(url),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answered(run: Run, *, after_s: float = 0) -> set[str]:
    """Return the ids in a run's ledger, those of texts without content with them."""
    time.sleep(after_s)
    parts = storage.here(run.lineage.ledger).rglob("*.parquet")
    return {id_ for part in parts for id_ in pq.read_table(part)["row_id"].to_pylist()}


# Nodes that share a machine share no cache, if one has another folder mounted there.
_APART = 'mount -t tmpfs none "$0" && exec "$@"'


@contextlib.contextmanager
def two_nodes(url: str, cache: Path, log: Path) -> Iterator[tuple[str, Path]]:
    """Run a Ray of two nodes, of which one computes, and the other one holds jobs alone.

    Yields its address, and the computing node's cache as it is seen from here.
    """
    [port] = autoscaling.free_ports(1)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    ray += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    address = f"127.0.0.1:{port}"
    head = [*ray, "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    node = ["unshare", "-m", "sh", "-c", _APART, str(cache), *ray]
    node += [f"--address={address}", "--num-cpus=2"]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w"))
        started = []
        for command_ in (head, node):
            started.append(
                stack.enter_context(
                    subprocess.Popen(
                        command_, env=environment(url), stdout=output, stderr=subprocess.STDOUT
                    )
                )
            )
            stack.callback(autoscaling.end, started[-1])
            told = len(started)
            wait_for(lambda told=told: log.read_text().count("Ray runtime started") == told)
        yield address, Path(f"/proc/{started[-1].pid}/root{cache}")


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="only root can give a process another view of the file system",
)
def test_nodes_that_share_no_disk_label_and_train(
    s3: str, runs: str, tmp_path: Path, small_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    run = Run(
        (
            *(f"runs={runs}", f"cache={cache}", "teacher.kind=scripted", *SMALL),
            # So many shards that both passes of the calibration go to the other node, too.
            *("corpus.shard_rows=50", "teacher.max_unlabeled_rows=1700", "train.num_workers=2"),
            # Whose vectors the driver makes, and workers find in the store.
            *("student.kind=static", f"student.model={small_encoder}", "student.dimensions=16"),
            "student.max_length=64",
            # Without gold nothing asks for the trained student but its export.
            "corpus.validation_fraction=0",
        )
    )
    with two_nodes(s3, cache, tmp_path / "log") as (address, of_node):
        monkeypatch.setenv("RAY_ADDRESS", address)
        for verb in ("prepare", "label", "train"):
            run_job(s3, run, verb)
        there = {path.name for path in of_node.glob("stores/*/*/*/*/*")}
        assert "shard-00000.parquet" in there
        assert not set(of_node.glob(f"stores/*/*/*/{MANIFEST}"))
    lineage = run.lineage
    seen = Run((*run.overrides, f"cache={tmp_path / 'third'}")).lineage.student().require()
    assert contents(seen.path) == contents(lineage.student().path)
    assert {path.name for path in seen.path.iterdir()} == {
        *("model", "signals", "audit.parquet", "epochs.parquet", MANIFEST)
    }
    # Of two epochs, by two workers.
    assert len(list((seen.path / "signals").iterdir())) == 4
    names = storage.names(lineage.run)
    assert not [
        name for name in names if name.endswith(".making") and storage.files(lineage.run / name)
    ]
