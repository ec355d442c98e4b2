"""Asking about a corpus in one dataset after the other."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

from llkd_ray.config import load_experiment
from llkd_ray.corpus import prepare, read_shards
from llkd_ray.teacher import readouts
from llkd_ray.teacher.actor import Opening
from llkd_ray.teacher.ledger import Ledger


def test_windows_hold_every_shard_once_and_no_more_rows_than_allowed() -> None:
    shards = [readouts.Shard(f"texts-{number}", "", 10) for number in range(7)]
    rows = [10, 4, 6, 30, 1, 9, 1]
    windows = list(readouts._windows(zip(shards, rows, strict=True), 10))
    assert [[shards.index(shard) for shard, _ in window] for window in windows] == [
        [0], [1, 2], [3], [4, 5], [6],
    ]  # fmt: skip
    assert list(readouts._windows([], 10)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_corpus_of_many_windows_and_of_blocks_of_several_batches_is_answered_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readouts, "_BLOCKS", 2)
    monkeypatch.setattr(readouts, "_BATCHES_PER_BLOCK", 3)
    source = tmp_path / "texts.csv"
    source.write_text("text,label\n" + "".join(f"number {n} of many,\n" for n in range(300)))
    experiment = load_experiment(
        QUICKSTART,
        [
            f"runs={tmp_path}",
            f"corpus.source={source}",
            "corpus.shard_rows=40",
            "corpus.test_fraction=0.0",
            "corpus.validation_fraction=0.0",
            "teacher.kind=scripted",
            "teacher.batch_size=16",
            'teacher.splits=["unlabeled"]',
        ],
    )
    corpus, answers = tmp_path / "corpus", tmp_path / "answers"
    corpus.mkdir()
    answers.mkdir()
    prepare(experiment.corpus, experiment.task, corpus)
    ledger = Ledger(tmp_path / "ledger", len(experiment.task.labels))
    ledger.open({})
    answered = readouts.read_out(corpus, answers, Opening.of(experiment), ledger)
    assert answered.taken == 300
    assert answered.answered_now == 300 + len(readouts.CONTENT_FREE)
    assert answered.duplicates == answered.rejected == 0
    assert answered.actors > 1  # One after the other.
    files = read_shards(answers / "unlabeled")
    assert sum(pq.read_metadata(file).num_rows for file in files) == 300
