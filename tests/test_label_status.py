"""What is done and what is left, read from hand-written ledgers."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llkd_ray import schema
from llkd_ray.artifacts import Artifact, Rows, make
from llkd_ray.config import VLLMTeacher
from llkd_ray.corpus import row_id
from llkd_ray.teacher.ledger import Ledger, range_name
from llkd_ray.teacher.readouts import Shard, count_unanswered, plan
from llkd_ray.teacher.status import SplitStatus, measured, status

SHARD_ROWS = 10
TEXTS = sorted((f"text {number}" for number in range(35)), key=row_id)
IDS = [row_id(text) for text in TEXTS]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three shards of unlabeled texts, half a shard of test texts, nothing to validate on."""
    folder = tmp_path / "corpus"
    for split, texts in (("unlabeled", TEXTS[:30]), ("test", TEXTS[30:]), ("validation", [])):
        (folder / split).mkdir(parents=True)
        for number, start in enumerate(range(0, len(texts), SHARD_ROWS)):
            rows = [
                {"row_id": row_id(text), "text": text, "gold": None}
                for text in texts[start : start + SHARD_ROWS]
            ]
            shard = pa.Table.from_pylist(rows, schema.TEXT)
            pq.write_table(shard, folder / split / f"shard-{number:05d}.parquet")
    return folder


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    opened = Ledger(tmp_path / "ledger", 2)
    opened.open({"prompt": "p"})
    return opened


def write(ledger: Ledger, ids: list[str], error: str | None = None, attempt: int = 1) -> None:
    entry = {"prompt_tokens": 1, "cached_tokens": 0, "cut_tokens": 0, "attempt": attempt}
    answer = {"logprobs": None if error else [-1.0, -2.0], "error": error}
    rows = [{"row_id": id_, **entry, **answer} for id_ in ids]
    parts = range_name(min(ids), max(ids))
    ledger.write(parts, pa.Table.from_pylist(rows, ledger.columns))


def test_without_a_ledger_every_row_is_left(corpus: Path, tmp_path: Path) -> None:
    nothing = Ledger(tmp_path / "none", 2)
    assert list(status(corpus, VLLMTeacher(), nothing)) == [
        SplitStatus("unlabeled", rows=30, done=0, rejected=0, left=30),
        SplitStatus("test", rows=5, done=0, rejected=0, left=5),
    ]
    assert not nothing.folder.exists()


def test_rows_are_done_rejected_or_left(corpus: Path, ledger: Ledger) -> None:
    write(ledger, IDS[3:13])
    write(ledger, IDS[13:16], error="too long")
    write(ledger, IDS[31:])
    assert list(status(corpus, VLLMTeacher(), ledger)) == [
        SplitStatus("unlabeled", rows=30, done=10, rejected=3, left=17),
        SplitStatus("test", rows=5, done=4, rejected=0, left=1),
    ]


def test_answers_about_rows_that_are_not_up_for_labelling_do_not_count(
    corpus: Path, ledger: Ledger
) -> None:
    write(ledger, [*IDS[:25], row_id("a text of another corpus")])
    teacher = VLLMTeacher(splits=("unlabeled",), max_unlabeled_rows=12)
    assert list(status(corpus, teacher, ledger)) == [SplitStatus("unlabeled", 12, 12, 0, 0)]


def test_parts_that_are_put_together_change_no_count(corpus: Path, ledger: Ledger) -> None:
    write(ledger, IDS[:7])
    write(ledger, IDS[20:22], error="refused")
    before = list(status(corpus, VLLMTeacher(), ledger))
    for parts in ledger.open_folders():
        ledger.compact(parts)
    assert list(status(corpus, VLLMTeacher(), ledger)) == before


def test_the_label_budget_is_spread_over_the_first_shards(corpus: Path) -> None:
    shards = plan(corpus, Path("out"), ("unlabeled", "test"), max_rows=14)
    assert [(shard.sealed, shard.take) for shard in shards] == [
        ("out/unlabeled/shard-00000.parquet", 10),
        ("out/unlabeled/shard-00001.parquet", 4),
        ("out/test/shard-00000.parquet", 5),
    ]
    assert [id_ for shard in shards[:2] for id_ in shard.row_ids().to_pylist()] == IDS[:14]
    everything = plan(corpus, Path("out"), ("unlabeled", "validation"), max_rows=None)
    assert [shard.take for shard in everything] == [10, 10, 10]


@pytest.mark.parametrize(("attempts", "left"), [(1, 4), (2, 6), (3, 7)])
def test_a_row_that_failed_is_asked_about_until_its_attempts_are_spent(
    corpus: Path, ledger: Ledger, attempts: int, left: int
) -> None:
    write(ledger, IDS[:3])
    write(ledger, IDS[3:6], error="timed out")
    write(ledger, IDS[5:6], error="timed out", attempt=2)
    shard = Shard(str(corpus / "unlabeled/shard-00000.parquet"), "unused", SHARD_ROWS)
    assert count_unanswered(shard, ledger, attempts) == left


def test_the_plan_goes_by_the_last_measured_rate_of_the_same_model(tmp_path: Path) -> None:
    for noun, model, tokens_per_s, actors in (
        ("a", "m1", 100.0, 1),
        ("b", "m2", 900.0, 1),
        ("c", "m1", 600.0, 2),
        ("d", "m1", 0.0, 0),
    ):
        artifact = Artifact(tmp_path, "readouts", "label", {"prompt": noun})
        with make(artifact) as draft:
            draft.rows = Rows(taken=1, kept=1, rejected=0)
            draft.details = {"model": model, "tokens_per_s": tokens_per_s, "actors": actors}
        # All were made within a second; give each a day of its own.
        path = artifact.path / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["created"] = f"2030-01-0{'abcd'.index(noun) + 1}T00:00:00+00:00"
        path.write_text(json.dumps(manifest))
    found = measured(tmp_path, "m1")
    assert found is not None
    assert found.tokens_per_s == 300.0
    assert measured(tmp_path, "m3") is None
