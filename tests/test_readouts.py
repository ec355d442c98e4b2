"""Asking about a corpus in one dataset after the other."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

from llkd_ray.config import load_experiment
from llkd_ray.corpus import prepare, read_shards
from llkd_ray.errors import TeacherError
from llkd_ray.teacher import readouts
from llkd_ray.teacher.actor import Opening, TeacherActor
from llkd_ray.teacher.answers import Answer, TeacherDiedError
from llkd_ray.teacher.ledger import Ledger, range_name


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


@pytest.mark.usefixtures("ray_local")
def test_an_actor_does_not_ask_about_a_batch_that_a_dead_one_has_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, len(load_experiment(QUICKSTART).task.labels))
    ids = [f"{number:064x}" for number in range(40)]
    shards = ids[:30], ids[30:]
    batch = pa.table(
        {
            "row_id": ids,
            "text": [f"number {number}" for number in range(40)],
            "attempt": pa.array([1] * 40, pa.int32()),
            "parts": [range_name(rows[0], rows[-1]) for rows in shards for _ in rows],
        }
    )

    def answer(rows_per_s: float, rows: pa.Table) -> dict[str, Any]:
        told = ["teacher.kind=scripted", f"teacher.rows_per_s={rows_per_s}"]
        actor = TeacherActor(Opening.of(load_experiment(QUICKSTART, told)), ledger)
        counts = asyncio.run(asyncio.wait_for(actor(rows), 5)).to_pylist()[0]
        return {name: counts[name] for name in ("rows", "prompt_tokens", "labels")}

    first = answer(1000, batch)
    assert first["rows"] == 40
    # Asked, this one would take most of a day.
    assert answer(0.001, batch) == first
    with pytest.raises(TimeoutError):
        answer(0.001, batch.slice(1))


class Mortal:
    """A teacher that may die of the first texts it reads."""

    way = None

    def __init__(self, *, dies: bool) -> None:
        self.dies, self.closed = dies, False

    async def read(self, texts: list[str]) -> list[Answer]:
        await asyncio.sleep(0.01)
        if self.dies:
            raise TeacherDiedError("dead")
        return [Answer([-0.1, -2.4], 1, 0, 0) for _ in texts]

    async def close(self) -> None:
        self.closed = True


class Mortals:
    """An opening for teachers of which the first die."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.started = deaths, list[Mortal]()

    def start(self) -> Mortal:
        self.started.append(Mortal(dies=len(self.started) < self.deaths))
        return self.started[-1]


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_teacher_that_dies_is_replaced_twice_and_once_for_all_batches(
    tmp_path: Path, deaths: int
) -> None:
    opening = Mortals(deaths)
    actor = TeacherActor(cast("Opening", opening), Ledger(tmp_path, 2))

    def batch(number: int) -> pa.Table:
        ids = [f"{number * 10 + row:064x}" for row in range(4)]
        attempts = pa.array([1] * 4, pa.int32())
        parts = [range_name(ids[0], ids[-1])] * 4
        return pa.table({"row_id": ids, "text": ["a"] * 4, "attempt": attempts, "parts": parts})

    async def ask() -> list[pa.Table | BaseException]:
        return await asyncio.gather(*(actor(batch(n)) for n in range(3)), return_exceptions=True)

    for answered in asyncio.run(ask()):
        if deaths < 3:
            assert isinstance(answered, pa.Table)
            assert answered["rows"].to_pylist() == [4]
        else:
            assert isinstance(answered, TeacherError)
            assert "died 3 times over the same 4 rows" in str(answered)
    assert len(opening.started) == min(deaths + 1, 3)
    assert [teacher.closed for teacher in opening.started[:2]] == [True, deaths > 1]
