"""How a run stands, what is left over in it, and what its journal tells; artifacts made by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run

from llkd_ray import journal
from llkd_ray.artifacts import Artifact, Rows, being_made, make
from llkd_ray.errors import ArtifactError
from llkd_ray.lineage import Lineage
from llkd_ray.standing import leftovers, remove, standings


def fill(artifact: Artifact, **details: float) -> Artifact:
    with make(artifact) as draft:
        (draft.folder / "rows").write_bytes(b"x" * 1000)
        draft.rows = Rows(taken=3, kept=2, rejected=1)
        draft.details = details
    return artifact


def with_settings(run: Run, *overrides: str) -> Lineage:
    return Run((*run.overrides, *overrides)).lineage


def test_each_artifact_of_the_main_line_has_a_state(run: Run) -> None:
    lineage = run.lineage
    fill(lineage.corpus)
    fill(lineage.readouts, cost_usd=0.25)
    lineage.labels.making.mkdir()
    found = {one.artifact.noun: one for one in standings(lineage)}
    assert {noun: one.state for noun, one in found.items()} == {
        "corpus": "made",
        "readouts": "made",
        "labels": "unfinished",
        "student": "not made",
        "onnx": "not made",
        "scores": "not made",
        "bench": "not made",
    }
    assert found["readouts"].cost_usd == 0.25
    assert found["corpus"].size_bytes > 1000
    with make(lineage.labels) as draft:
        assert [one.state for one in standings(lineage)][2] == "being made"
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert not being_made(lineage.labels.path)
    # Not of the main line, so told only when something of it is there.
    lineage.seed.making.mkdir()
    assert "seed" in {one.artifact.noun for one in standings(lineage)}


def test_what_other_settings_made_is_left_over(run: Run) -> None:
    lineage = run.lineage
    other = with_settings(run, "train.epochs=7", 'task.instruction="Other words."')
    for artifact in (lineage.corpus, lineage.readouts, other.readouts, other.student()):
        fill(artifact)
    for ledger in (lineage.ledger, other.ledger):
        ledger.mkdir()
    (lineage.run / "trials").mkdir()
    (lineage.run / "report.html").write_text("")
    found = {leftover.path: leftover for leftover in leftovers(lineage)}
    assert set(found) == {other.readouts.path, other.student().path, other.ledger}
    assert [leftover.answers for leftover in found.values()].count(True) == 1
    assert found[other.ledger].answers
    remove(found[other.student().path])
    assert not other.student().path.exists()
    # Killed while it removed: no artifact any more, and a leftover still.
    other.readouts.path.rename(other.readouts.path.with_name(f"{other.readouts.path.name}.removed"))
    assert not other.readouts.made
    [gone] = [leftover for leftover in leftovers(lineage) if not leftover.answers]
    remove(gone)
    assert [leftover.answers for leftover in leftovers(lineage)] == [True]
    assert lineage.corpus.made
    assert lineage.readouts.made


def test_labels_that_a_compared_variant_needs_are_not_left_over(run: Run) -> None:
    splits = 'teacher.splits=["unlabeled","validation","test"]'
    other = with_settings(run, splits, "calibration.kind=temperature")
    fill(other.labels)
    compares = 'compare.variants.own=["calibration.kind=temperature"]'
    assert leftovers(with_settings(run, splits, compares)) == []
    assert len(leftovers(with_settings(run, splits))) == 1


def test_nothing_is_left_over_while_a_job_with_other_settings_is_at_work(run: Run) -> None:
    other = with_settings(run, "corpus.shard_rows=7").corpus
    with make(other) as draft:
        with pytest.raises(ArtifactError, match="a job with other settings is at work here"):
            leftovers(run.lineage)
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert [leftover.path for leftover in leftovers(run.lineage)] == [other.path]


def test_what_was_written_to_deep_within_was_written_to_lately(run: Run) -> None:
    unfinished = with_settings(run, "corpus.shard_rows=7").corpus.making
    (unfinished / "ray_train").mkdir(parents=True)
    (unfinished / "ray_train/checkpoint").write_text("new")
    for path in (unfinished, unfinished / "ray_train"):
        os.utime(path, (0, 0))
    [leftover] = leftovers(run.lineage)
    assert leftover.age_s < 600


def test_rows_written_for_a_compared_variant_are_not_left_over(run: Run) -> None:
    more = ("train.lessons=true", "guide.samples=512")
    other = with_settings(run, *more)
    fill(other.seed)
    fill(other.lessons(1))
    compares = f"compare.variants.more={json.dumps(more)}"
    assert leftovers(with_settings(run, compares)) == []
    assert [leftover.path for leftover in leftovers(run.lineage)] == [other.lessons(1).path]


def test_cleaning_lists_first_and_removes_when_told(run: Run) -> None:
    lineage, other = run.lineage, with_settings(run, "corpus.shard_rows=7", "teacher.readout=trie")
    fill(lineage.corpus)
    fill(other.corpus)
    other.ledger.mkdir()
    listed = run.job("clean")
    assert listed.returncode == 0, listed.stderr
    assert f"{other.corpus.path}: 0.0 MB" in listed.stdout
    assert listed.stdout.splitlines()[-1].startswith("clean: 1 folders to remove with --delete")
    assert other.corpus.made
    spared = run.job("clean", "--delete", "--older-than-days", "1")
    assert spared.stdout.startswith("clean: 0 folders removed")
    assert run.job("clean", "--delete").returncode == 0
    assert not other.corpus.path.exists()
    assert other.ledger.is_dir()
    assert run.job("clean", "--delete", "--answers").returncode == 0
    assert not other.ledger.exists()
    assert lineage.corpus.made


def test_the_journal_tells_how_jobs_went(run: Run) -> None:
    folder = run.lineage.run
    assert run.job("prepare").returncode == 0
    failed = run.job("train")
    assert failed.returncode == 1
    lines = [json.loads(line) for line in (folder / journal.FILE).read_text().splitlines()]
    assert [(line["stage"], line["event"]) for line in lines if line["event"] != "log"] == [
        ("prepare", "started"),
        ("prepare", "done"),
        ("train", "started"),
        ("train", "failed"),
    ]
    assert {line["run"] for line in lines} == {"quickstart"}
    assert lines[0]["overrides"] == list(run.overrides)
    assert lines[-1]["error"] in failed.stderr
    told = run.job("status")
    assert told.returncode == 0, told.stderr
    assert run.lineage.corpus.path.name in told.stdout
    assert "jobs/prepare.py: done 20" in told.stdout
    assert f": {lines[-1]['error']}" in told.stdout


def test_a_job_that_was_killed_has_not_ended(run: Run) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from llkd_ray.journal import recorded\n"
        "with recorded(Path(sys.argv[2]), 'label', []):\n    print(flush=True); time.sleep(60)"
    )
    folder = run.lineage.run
    with subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(folder)], stdout=subprocess.PIPE
    ) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        killed.kill()
    with (folder / journal.FILE).open("a") as file:
        file.write('{"cut off')
    last = journal.last_of_each_stage(folder)["label"]
    assert (last["event"], last["pid"]) == ("started", killed.pid)
    assert f"process {killed.pid} on {last['host']}" in run.job("status").stdout


def test_a_job_that_is_interrupted_says_so(run: Run) -> None:
    folder = run.lineage.run
    with pytest.raises(KeyboardInterrupt), journal.recorded(folder, "label", []):
        raise KeyboardInterrupt
    assert journal.last_of_each_stage(folder)["label"]["event"] == "interrupted"


def test_a_folder_that_cannot_hold_a_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Run((f"runs={tmp_path / 'file'}",))
    failed = run.job("prepare")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {tmp_path / 'file/quickstart'}: a run cannot be kept")
    assert len(failed.stderr.splitlines()) == 1


def test_nothing_is_told_of_a_run_that_is_not_there(tmp_path: Path) -> None:
    assert journal.last_of_each_stage(tmp_path) == {}
    run = Run((f"runs={tmp_path / 'none'}",))
    assert leftovers(run.lineage) == []
    assert {one.state for one in standings(run.lineage)} == {"not made"}
