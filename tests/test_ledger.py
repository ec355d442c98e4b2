from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from llkd_ray.errors import ArtifactError, TeacherError
from llkd_ray.teacher.ledger import Ledger, range_name

IDS = [f"{number:032x}" for number in range(0, 1 << 124, 1 << 117)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    opened = Ledger(tmp_path / "ledger", 2)
    opened.open({"prompt": "p"})
    return opened


def entries(ledger: Ledger, ids: list[str], attempt: int = 1, error: str | None = None) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "row_id": id_,
                "logprobs": None if error else [-1.0, -float(attempt)],
                "prompt_tokens": 3,
                "cached_tokens": 0,
                "cut_tokens": 0,
                "error": error,
                "attempt": attempt,
            }
            for id_ in ids
        ],
        ledger.columns,
    )


def found(ledger: Ledger, ids: list[str]) -> list[tuple[str, str | None]]:
    rows = ledger.find(pa.array(ids)).to_pylist()
    return [(row["row_id"], row["error"]) for row in rows]


def test_what_was_written_is_found_in_the_order_asked_for_before_and_after_compaction(
    ledger: Ledger,
) -> None:
    parts = range_name(IDS[0], IDS[-1])
    ledger.write(parts, entries(ledger, IDS[40:80]))
    ledger.write(parts, entries(ledger, IDS[10:40]))
    expected = [(id_, None) for id_ in IDS[10:80]]
    assert found(ledger, IDS) == expected
    ledger.compact(parts)
    assert ledger.open_folders() == []
    assert found(ledger, IDS) == expected
    assert found(ledger, IDS[70:90]) == expected[-10:]


def test_a_grown_corpus_finds_answers_across_other_shard_boundaries(ledger: Ledger) -> None:
    for start in range(0, 100, 30):
        ledger.write(range_name(IDS[start], IDS[start + 29]), entries(ledger, IDS[start::3][:10]))
    ledger.compact(range_name(IDS[30], IDS[59]))
    known = {id_ for start in range(0, 100, 30) for id_ in IDS[start::3][:10]}
    for start in range(0, 120, 7):
        asked = IDS[start : start + 7]
        assert [id_ for id_, _ in found(ledger, asked)] == [id_ for id_ in asked if id_ in known]


def test_the_same_batch_written_twice_is_one_file(ledger: Ledger) -> None:
    parts = range_name(IDS[0], IDS[9])
    for _ in range(2):
        ledger.write(parts, entries(ledger, IDS[:10]))
    assert len(list((ledger.folder / parts).glob("*.parquet"))) == 1


def test_a_batch_that_was_written_is_known_by_its_rows_and_attempts(ledger: Ledger) -> None:
    parts = range_name(IDS[0], IDS[9])
    batch = entries(ledger, IDS[:10])
    assert ledger.written(parts, batch) is None
    ledger.write(parts, batch)
    assert ledger.written(parts, batch.select(["row_id", "attempt"])) == batch
    assert ledger.written(parts, batch.slice(1)) is None
    assert ledger.written(parts, entries(ledger, IDS[:10], attempt=2)) is None
    assert ledger.written(range_name(IDS[10], IDS[19]), batch) is None


def test_overlapping_batches_leave_one_entry_a_row(ledger: Ledger) -> None:
    parts = range_name(IDS[0], IDS[19])
    ledger.write(parts, entries(ledger, IDS[:10]))
    ledger.write(parts, entries(ledger, IDS[5:15]))
    assert found(ledger, IDS[:20]) == [(id_, None) for id_ in IDS[:15]]


def test_an_answer_comes_before_a_failure_and_the_last_failure_before_the_first(
    ledger: Ledger,
) -> None:
    parts = range_name(IDS[0], IDS[9])
    ledger.write(parts, entries(ledger, IDS[:3], 1, "first"))
    ledger.write(parts, entries(ledger, IDS[:3], 2, "second"))
    ledger.write(parts, entries(ledger, IDS[1:2], 3))
    assert found(ledger, IDS[:4]) == [(IDS[0], "second"), (IDS[1], None), (IDS[2], "second")]


def test_a_part_that_a_crash_left_half_written_is_not_read(ledger: Ledger) -> None:
    parts = range_name(IDS[0], IDS[9])
    ledger.write(parts, entries(ledger, IDS[:2]))
    folder = ledger.folder / parts
    (folder / f".{range_name(IDS[3], IDS[4])}-00000000.parquet.77").write_bytes(b"PAR1 half")
    assert found(ledger, IDS[:10]) == [(id_, None) for id_ in IDS[:2]]
    ledger.compact(parts)
    assert found(ledger, IDS[:10]) == [(id_, None) for id_ in IDS[:2]]


def test_a_crash_between_compaction_and_removal_changes_nothing(ledger: Ledger) -> None:
    parts = range_name(IDS[0], IDS[9])
    ledger.write(parts, entries(ledger, IDS[:10]))
    part = next((ledger.folder / parts).iterdir())
    kept = part.read_bytes()
    ledger.compact(parts)
    (ledger.folder / parts).mkdir()
    (ledger.folder / parts / part.name).write_bytes(kept)
    assert found(ledger, IDS[:10]) == [(id_, None) for id_ in IDS[:10]]


def test_a_reader_misses_nothing_while_parts_are_compacted(ledger: Ledger) -> None:
    folders = [range_name(IDS[start], IDS[start + 9]) for start in range(0, 120, 10)]
    for start, parts in zip(range(0, 120, 10), folders, strict=True):
        for id_ in IDS[start : start + 10]:
            ledger.write(parts, entries(ledger, [id_]))
    with ThreadPoolExecutor() as pool:
        compacting = pool.submit(lambda: [ledger.compact(parts) for parts in folders])
        while not compacting.done():
            assert len(found(ledger, IDS[:120])) == 120
        compacting.result()
    assert len(found(ledger, IDS[:120])) == 120


def test_a_file_that_is_listed_and_cannot_be_read_is_told_not_waited_for(ledger: Ledger) -> None:
    name = f"{range_name(IDS[0], IDS[9])}-00000000.parquet"
    (ledger.folder / name).symlink_to(ledger.folder / "gone")
    with pytest.raises(FileNotFoundError):
        found(ledger, IDS[:10])


def test_an_empty_ledger_knows_nothing(ledger: Ledger, tmp_path: Path) -> None:
    assert found(ledger, IDS) == []
    assert found(Ledger(tmp_path / "none", 2), IDS) == []


def test_all_answers_are_read_in_the_way_of_the_first(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.agree("log-probabilities of words")
    with pytest.raises(
        TeacherError, match=r"gives votes of words now, .* log-probabilities of wor"
    ):
        ledger.agree("votes of words")
    ledger.write("0-f", entries(ledger, IDS[:1]))
    assert ledger.open_folders() == ["0-f"]


def test_a_second_writer_is_told_to_wait(ledger: Ledger) -> None:
    with (
        ledger.only_writer(),
        pytest.raises(ArtifactError, match="another job is labelling"),
        ledger.only_writer(),
    ):
        pass
