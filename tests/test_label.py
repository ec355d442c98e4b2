"""Labelling with the real teacher.

`small_run` has labelled once. One test below starts engines of its own, and no more than it needs,
for each start takes long: a run that is killed and resumed on a corpus that has grown.
"""

import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, ROOT, Run, command
from training_data import questions

from llkd_ray import schema
from llkd_ray.config import load_experiment
from llkd_ray.corpus import read_shards
from llkd_ray.teacher.answers import CONTENT_FREE
from llkd_ray.teacher.ledger import Ledger

pytestmark = pytest.mark.slow


def table(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(shard) for shard in read_shards(folder / split))


def ledger_of(run: Run) -> pa.Table:
    """All entries of a run's ledger, parts and files alike."""
    ledger = Ledger(run.lineage.ledger, len(run.experiment.task.labels))
    files = [path for path in ledger.folder.rglob("*.parquet") if not path.name.startswith(".")]
    return pa.concat_tables([ledger.columns.empty_table(), *map(pq.read_table, sorted(files))])


TOO_LONG = [f"What is it that {number} ? " + "and on " * 60 + "?" for number in range(3)]


def on_questions(run: Run, texts: Sequence[str], *more: str) -> Run:
    """The small experiment on these texts alone, all of them to be labelled."""
    source = Path(run.experiment.runs) / "questions.jsonl"
    source.write_text("".join(json.dumps({"text": text, "label": None}) + "\n" for text in texts))
    return Run(
        (*run.overrides, f"corpus.source={source}", 'teacher.splits=["unlabeled"]', *more),
    )


@pytest.fixture(scope="session")
def texts() -> list[str]:
    shown = {example.text for example in load_experiment(QUICKSTART).task.examples}
    return [text for _, text, _ in questions() if text not in shown][:117]


def test_every_row_asked_about_has_one_label_and_nothing_else_has(small_run: Run) -> None:
    lineage = small_run.lineage
    asked = table(lineage.corpus.path, "unlabeled").slice(0, 160)
    labels = table(lineage.labels.path, "unlabeled")
    assert labels.schema.equals(schema.labels(6))
    assert labels.select(schema.TEXT.names).equals(asked)
    test = table(lineage.corpus.path, "test")
    assert table(lineage.labels.path, "test").select(schema.TEXT.names).equals(test)
    rows = lineage.readouts.manifest().rows
    assert (rows.taken, rows.rejected) == (160 + len(test), 0)


def test_the_ledger_holds_each_answer_once_beside_what_it_depends_on(small_run: Run) -> None:
    lineage = small_run.lineage
    entries = ledger_of(small_run)
    asked = {
        id_
        for split in ("unlabeled", "test")
        for id_ in table(lineage.readouts.path, split).column("row_id").to_pylist()
    }
    ids = entries.column("row_id").to_pylist()
    assert len(ids) == len(set(ids)) == len(asked) + len(CONTENT_FREE)
    assert asked < set(ids)
    assert lineage.ledger.parent == lineage.run
    assert not [path for path in lineage.ledger.iterdir() if path.is_dir()]
    identity = json.loads((lineage.ledger / "identity.json").read_text())
    assert identity == json.loads(json.dumps(lineage.asking))


def test_labels_follow_from_the_stored_log_probabilities(small_run: Run) -> None:
    labels = table(small_run.lineage.labels.path, "unlabeled")
    logprobs = np.array(labels.column("logprobs").to_pylist())
    mass = np.exp(logprobs).sum(axis=1)
    np.testing.assert_allclose(labels.column("label_mass").to_numpy(), mass, rtol=1e-5)
    assert (mass > 0).all()
    assert (mass <= 1 + 1e-5).all()
    normal = np.exp(logprobs) / mass[:, None]
    calibrated = normal / normal.mean(axis=0)
    calibrated /= calibrated.sum(axis=1, keepdims=True)
    stored = np.array(labels.column("probabilities").to_pylist())
    np.testing.assert_allclose(stored, calibrated, atol=1e-5)
    names = np.array(small_run.experiment.task.label_names)
    assert labels.column("label").to_pylist() == names[stored.argmax(axis=1)].tolist()
    np.testing.assert_allclose(labels.column("confidence").to_numpy(), stored.max(axis=1))


def test_the_teacher_is_right_far_more_often_than_by_chance(small_run: Run) -> None:
    labels = table(small_run.lineage.labels.path, "unlabeled")
    right = pc.equal(labels.column("label"), labels.column("gold")).to_numpy()
    assert right.mean() > 0.5


def test_the_shared_prefix_comes_from_the_cache(small_run: Run) -> None:
    summary = small_run.summary()["labels"]
    assert summary["cached_tokens"] / summary["prompt_tokens"] > 0.7


def test_another_calibration_asks_the_teacher_nothing(small_run: Run) -> None:
    done = small_run.job("label", "calibration.kind=none", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert "readouts" not in done.stdout
    assert "labels-" in done.stdout


def test_a_finished_labelling_is_left_alone(small_run: Run) -> None:
    before = (small_run.lineage.labels.path / "manifest.json").stat().st_mtime_ns
    started = time.perf_counter()
    done = small_run.job("label")
    assert time.perf_counter() - started < 10
    assert "is there already" in done.stdout
    assert (small_run.lineage.labels.path / "manifest.json").stat().st_mtime_ns == before


def test_the_manifest_says_what_made_it(small_run: Run) -> None:
    manifest = json.loads((small_run.lineage.labels.path / "manifest.json").read_text())
    assert manifest["inputs"] == {
        "corpus": small_run.lineage.corpus.fingerprint,
        "readouts": small_run.lineage.readouts.fingerprint,
    }


def test_status_counts_what_is_done(small_run: Run) -> None:
    told = small_run.job("label", "--status", timeout_s=60)
    assert told.returncode == 0, told.stderr
    assert ["unlabeled", "160", "160", "0", "0"] in map(str.split, told.stdout.splitlines())
    more = small_run.job("label", "teacher.max_unlabeled_rows=200", "--status", timeout_s=60)
    assert ["unlabeled", "200", "160", "0", "40"] in map(str.split, more.stdout.splitlines())
    assert "is not made yet" in more.stdout


def test_a_changed_prompt_has_a_ledger_of_its_own_and_nothing_done(small_run: Run) -> None:
    changed = Run((*small_run.overrides, "task.text_prefix=Asked:"))
    assert changed.lineage.ledger.parent == small_run.lineage.ledger.parent
    assert changed.lineage.ledger != small_run.lineage.ledger
    told = changed.job("label", "--status", timeout_s=60)
    assert ["unlabeled", "160", "0", "0", "160"] in map(str.split, told.stdout.splitlines())


def test_the_plan_shows_the_prompt_and_what_is_left_and_makes_nothing(small_run: Run) -> None:
    changed = Run((*small_run.overrides, "task.text_prefix=Asked:"))
    planned = changed.job("label", "--dry-run", timeout_s=120)
    assert planned.returncode == 0, planned.stderr
    assert "Asked: What color is an Arctic fox in winter ?" in planned.stdout
    assert not changed.lineage.ledger.exists()
    assert not changed.lineage.readouts.making.exists()


def test_labelling_without_a_corpus_names_the_job_to_run(run: Run) -> None:
    done = run.job("label")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "run python jobs/prepare.py" in done.stderr


def rows_of_ledger(run: Run) -> set[str]:
    return set(ledger_of(run).column("row_id").to_pylist())


@pytest.mark.usefixtures("ray_local")
def test_a_killed_run_goes_on_over_a_grown_corpus_and_asks_nothing_twice(
    run: Run, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "teacher.batch_size=4",
        "teacher.prompt.max_text_tokens=64",
        "teacher.prompt.overlong=reject",
        "teacher.max_rejected_fraction=0.5",
    )
    before = on_questions(run, [*texts[:87], *TOO_LONG], *settings)
    before.stage("prepare")
    corpus = before.lineage.corpus.path
    with subprocess.Popen(
        command("label", str(QUICKSTART), *before.overrides),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as killed:
        deadline = time.monotonic() + 300
        while len(ledger_of(before)) < 12:
            assert killed.poll() is None, "the job ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(killed.pid, signal.SIGKILL)
    assert not before.lineage.readouts.made
    # What Ray had under way may still land; from here on it must not.
    there, kept = None, rows_of_ledger(before)
    while kept != there:
        time.sleep(5)
        there, kept = kept, rows_of_ledger(before)
    assert 12 <= len(kept) < 90

    grown = on_questions(run, [*texts, *TOO_LONG], *settings)
    grown.stage("prepare")
    assert grown.lineage.corpus.path != corpus
    assert grown.lineage.ledger == before.lineage.ledger
    grown.stage("label")
    manifest = grown.lineage.readouts.manifest()
    assert manifest.details["answered_now"] == 120 + len(CONTENT_FREE) - len(kept)
    assert manifest.details["duplicates"] == 0
    # What is too long for the engine is kept aside; every other row has its label, in order.
    assert (manifest.rows.kept, manifest.rows.rejected) == (117, 3)
    entries = ledger_of(grown)
    assert entries.filter(pc.is_valid(entries.column("error"))).num_rows == 3
    asked = table(grown.lineage.corpus.path, "unlabeled")
    answered = asked.filter(pc.invert(pc.is_in(asked.column("text"), pa.array(TOO_LONG))))
    labels = table(grown.lineage.labels.path, "unlabeled")
    assert labels.select(schema.TEXT.names).equals(answered)

    importlib.import_module("label").print_plan(
        Run((*grown.overrides, "teacher.attempts=2")).experiment
    )
    assert "rows to label: 3 (120, less 117 asked about already)" in capsys.readouterr().out
