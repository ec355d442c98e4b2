import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, Run, run_job

from llkd_ray import corpus, sources
from llkd_ray.config import CorpusSection, Example, Label, TaskSection
from llkd_ray.digests import digests
from llkd_ray.errors import CorpusError, TooManyRejectedError

TASK = TaskSection(labels=(Label(name="good", gold=("1",)), Label(name="bad", gold=("0",))))


def config(source: Path | str, **settings: object) -> CorpusSection:
    return CorpusSection(source=str(source), max_rejected_fraction=1.0, **settings)  # type: ignore[arg-type]


def prepared(
    tmp_path: Path, source: CorpusSection, task: TaskSection = TASK
) -> tuple[corpus.Prepared, dict[str, list[dict[str, str]]], list[dict[str, str]]]:
    folder = tmp_path / "corpus"
    folder.mkdir()
    counts = corpus.prepare(source, task, folder)
    splits = {
        split: [
            row
            for shard in corpus.read_shards(folder / split)
            for row in pq.read_table(shard).to_pylist()
        ]
        for split in corpus.SPLITS
    }
    return counts, splits, pq.read_table(folder / "rejected.parquet").to_pylist()


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_the_built_in_corpus_is_distinct_split_and_labelled(run: Run) -> None:
    assert (
        run.job(
            "prepare", "corpus.validation_fraction=0.09", "corpus.test_fraction=0.09"
        ).returncode
        == 0
    )
    manifest = next(run.lineage.run.glob("corpus-*/manifest.json"))
    details = json.loads(manifest.read_text())["details"]
    assert details["read"] == 15452
    assert details["unlabeled"] > 4200
    assert 450 < details["validation"] < 550
    assert 450 < details["test"] < 550
    assert details["examples"] == len(run.experiment.task.examples)
    distinct = details["unlabeled"] + details["validation"] + details["test"]
    assert distinct + details["examples"] == 5381
    rows = [
        row
        for shard in sorted(manifest.parent.glob("*/shard-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]
    assert len({row["row_id"] for row in rows}) == len({row["text"] for row in rows}) == distinct
    assert {row["gold"] for row in rows} == set(run.experiment.task.label_names)
    shown = {example.text for example in run.experiment.task.examples}
    assert not shown & {row["text"] for row in rows}


def test_a_rows_split_follows_from_its_text_alone(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(300)]
    golds = ["1"] * 300
    whole = write_parquet(tmp_path / "a.parquet", text=texts, label=golds)
    part = write_parquet(tmp_path / "b.parquet", text=texts[::-2], label=golds[::-2])
    settings = {"gold_column": "label", "validation_fraction": 0.2, "test_fraction": 0.2}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    _, all_splits, _ = prepared(tmp_path / "1", config(whole, **settings))
    _, some_splits, _ = prepared(tmp_path / "2", config(part, **settings))
    for split in corpus.SPLITS:
        assert {row["row_id"] for row in some_splits[split]} <= {
            row["row_id"] for row in all_splits[split]
        }
        assert 20 < len(all_splits[split]) < 240


def test_bad_rows_are_kept_aside_with_a_reason(tmp_path: Path) -> None:
    lines = [
        {"text": "fine"},
        {"text": None},
        {"text": "  "},
        {"text": 7},
        {"text": "x" * 50},
        {"text": "broken \ud800 half"},
        {},
        {"text": "null \x00 byte, emoji \U0001f600, right to left \u05d0\u05d1"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n[1]\n")
    counts, splits, rejected = prepared(tmp_path, config(path, max_text_chars=49))
    assert [row["text"] for row in splits["unlabeled"]].count("fine") == 1
    assert len(splits["unlabeled"]) == 2
    assert {row["where"]: row["reason"] for row in rejected} == {
        "rows.jsonl:1": "the text is null",
        "rows.jsonl:2": "the text is empty",
        "rows.jsonl:3": "the text is not text but int",
        "rows.jsonl:4": "the text is longer than corpus.max_text_chars = 49",
        "rows.jsonl:5": "the text is not valid Unicode",
        "rows.jsonl:6": "the text is null",
        "rows.jsonl:8": "the line is not JSON",
        "rows.jsonl:9": "the line is no object",
    }
    assert counts.read == 10
    assert counts.rows.taken == 10
    assert counts.rejected == 8


def test_unknown_and_contradicting_gold_is_kept_aside(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        text=["a", "b", "b", "c", "c", "d"],
        label=["maybe", "1", "0", "1", None, None],
    )
    counts, splits, rejected = prepared(
        tmp_path, config(path, gold_column="label", validation_fraction=1.0, test_fraction=0.0)
    )
    assert [row["reason"] for row in rejected] == [
        "gold value 'maybe' is not among task.labels",
        "rows with this text disagree on gold: bad, good",
        "rows with this text disagree on gold: bad, good",
    ]
    assert [(row["text"], row["gold"]) for row in splits["validation"]] == [("c", "good")]
    assert [(row["text"], row["gold"]) for row in splits["unlabeled"]] == [("d", None)]
    assert counts.duplicates == 1


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_the_same_rows_come_from_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": 'with "quotes", commas', "y": "1"}, {"body": "two\nlines", "y": "0"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text('y,body\n1,"with ""quotes"", commas"\n0,"two\nlines"\n')
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    found = list(sources.read(config(path, text_column="body", gold_column="y")))
    assert [(row.text, row.gold) for row in found] == [(row["body"], row["y"]) for row in rows]


def test_a_broken_csv_line_is_kept_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,y\na,1\nb,1,extra\nc,0\n")
    _, splits, rejected = prepared(tmp_path, config(tmp_path / "rows.csv"))
    assert {row["text"] for row in splits["unlabeled"]} == {"a", "c"}
    assert [row["reason"] for row in rejected] == ["the line has 3 columns, not 2"]


def test_a_folder_is_read_file_by_file_and_by_uri(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "1.parquet", text=["a"])
    (folder / "2.jsonl").write_text('{"text": "b"}')
    (folder / "3.CSV").write_text("text\nc\n")
    (folder / "notes.txt").write_text("not data")
    (folder / "_SUCCESS").write_text("")
    for source in (str(folder), folder.as_uri()):
        assert [row.text for row in sources.read(config(source))] == ["a", "b", "c"]
        [told] = [one.getMessage() for one in caplog.records if source in one.getMessage()]
        assert told.endswith(
            "left out 1 files that are hidden or do not end in .parquet, .csv, .jsonl: notes.txt"
        )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("absent.parquet", None, "no such file or folder"),
        ("rows.txt", b"text", r"no file that ends in \.parquet"),
        ("rows.parquet", b"", "the file is empty"),
        ("rows.parquet", b"PAR1 this is none", "not a readable parquet file"),
        ("rows.csv", b"a,b\n1,2\n", "no column 'text'; the columns are a, b"),
        (
            "rows.csv",
            b"text;label\na,b;c\n",
            "they are separated by ';'; save the file with commas",
        ),
        ("rows.csv", "text,label\na,c\n".encode("utf-16"), "save the file as UTF-8"),
        ("rows.jsonl", b'{"a": 1}', "no column 'text'; the columns are a"),
        ("rows.jsonl", b"\n\n", "there are no rows"),
    ],
)
def test_a_source_that_cannot_be_read_is_told(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=told):
        prepared(tmp_path, config(tmp_path / name))


def test_a_number_column_is_not_taken_for_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=[1, 2])
    with pytest.raises(
        CorpusError, match=r"'text' holds int64, not text; .* holds text: there is none here"
    ):
        prepared(tmp_path, config(path))
    write_parquet(path, text=[1, 2], body=["a", "b"], title=["c", "d"], stars=[0.5, 1.0])
    with pytest.raises(CorpusError, match=r"a column that holds text: body, title$"):
        next(sources.read(config(path)))


def test_too_many_bad_rows_stop_the_job_with_the_commonest_reasons(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["a", None, None, ""])
    source = CorpusSection(source=str(path), max_rejected_fraction=0.5)
    with pytest.raises(TooManyRejectedError, match=r"3 of 4 rows.*the text is null \(2\)"):
        prepared(tmp_path, source)


def test_a_corpus_that_is_all_examples_says_so(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["a", "b"], gold=["0", "1"])
    with pytest.raises(CorpusError, match=r"2 of 2 are examples .* lower task\.max_examples"):
        prepared(tmp_path, config(path, gold_column="gold"), with_pool(path))


def test_examples_shown_to_the_teacher_are_left_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["shown", "kept", "shown"])
    task = TaskSection(labels=TASK.labels, examples=(Example(text=" shown ", label="good"),))
    counts, splits, _ = prepared(tmp_path, config(path), task)
    assert [row["text"] for row in splits["unlabeled"]] == ["kept"]
    assert (counts.examples, counts.duplicates) == (1, 1)


def with_pool(source: Path | str, *, task: TaskSection = TASK, **settings: object) -> TaskSection:
    return task.model_copy(update={"examples_source": str(source), **settings})


def test_the_pool_is_the_gold_rows_with_the_smallest_ids(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(50)]
    golds = [str(n % 2) for n in range(50)]
    path = write_parquet(
        tmp_path / "rows.parquet",
        text=[*texts, *texts[:20], "unknown", "nobody's", None, " ", "said both", "said both"],
        label=[*golds, *golds[:20], "maybe", None, "1", "1", "0", "1"],
    )
    source = config(path, gold_column="label")
    fixed = Example(text=min(texts, key=corpus.row_id), label="good")
    task = TaskSection(labels=TASK.labels, examples=(fixed,))
    everything = corpus.example_pool(source, with_pool(path, task=task))
    expected = [
        Example(text=text, label="good" if gold == "1" else "bad")
        for text, gold in sorted(
            zip(texts, golds, strict=True), key=lambda row: corpus.row_id(row[0])
        )
        if text != fixed.text
    ]
    assert list(everything) == expected
    few = corpus.example_pool(source, with_pool(path, task=task, max_examples=7))
    assert [e for e in few if e.text != "said both"] == expected[: len(few)]
    assert 6 <= len(few) <= 7
    assert corpus.example_pool(source, task) == ()


def test_the_pool_is_left_out_of_the_corpus_it_was_taken_from(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "rows.parquet", text=[f"text {n % 30}" for n in range(40)], label=["1"] * 40
    )
    source = config(path, gold_column="label")
    fixed = Example(text="text 3", label="good")
    task = with_pool(path, task=TaskSection(labels=TASK.labels, examples=(fixed,)), max_examples=5)
    counts, splits, _ = prepared(tmp_path, source, task)
    shown = {example.text for example in (fixed, *corpus.example_pool(source, task))}
    assert len(shown) == counts.examples == 6
    left = [row["text"] for split in splits.values() for row in split]
    assert sorted(left) == sorted({f"text {n}" for n in range(30)} - shown)
    assert counts.read == 40 == len(left) + counts.duplicates + counts.examples


def test_the_pool_may_come_from_the_built_in_corpus(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["How far is it ?"], label=["1"])
    task = TaskSection(labels=tuple(Label(name=name) for name in ("HUM", "LOC", "NUM")))
    pool = corpus.example_pool(config(path), with_pool("trec", task=task, max_examples=20))
    assert len(pool) == 20
    assert {example.label for example in pool} <= {"HUM", "LOC", "NUM"}


def test_a_pool_without_gold_is_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["a"], label=["maybe"])
    with pytest.raises(CorpusError, match=r"examples need gold; set corpus\.gold_column"):
        corpus.example_pool(config(path), with_pool(path))
    with pytest.raises(CorpusError, match=r"task\.examples_source = .* no row beside"):
        corpus.example_pool(config(path, gold_column="label"), with_pool(path))
    with pytest.raises(CorpusError, match=r"task\.examples_source = .*: no such file"):
        corpus.example_pool(config(path, gold_column="label"), with_pool(tmp_path / "no"))


def test_the_source_of_the_pool_has_an_identity_of_its_own(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=["a"])
    other = write_parquet(tmp_path / "pool.parquet", text=["b"])
    of_pool = sources.identity(config(path), tmp_path, str(other))
    assert of_pool == sources.identity(config(other), tmp_path)
    assert of_pool != sources.identity(config(path), tmp_path)


def test_a_copy_is_the_same_source_and_a_changed_file_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\nfirst\nsecond\n")
    found = sources.identity(config(path), tmp_path)
    os.utime(path, (1, 1))
    assert sources.identity(config(path), tmp_path) == found
    copy = tmp_path / "elsewhere/rows.csv"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert sources.identity(config(copy), tmp_path) == found
    path.write_text("text\nfirst\nSECOND\n")
    assert sources.identity(config(path), tmp_path) != found


def test_a_file_of_the_same_size_and_time_is_not_read_again(tmp_path: Path) -> None:
    path, memory = tmp_path / "rows.csv", tmp_path / "cache/memory.json"
    path.write_text("first")
    os.utime(path, (1, 1))
    found = digests([path], memory)
    assert found == [hashlib.sha256(b"first").hexdigest()]
    path.write_text("other")
    os.utime(path, (1, 1))
    assert digests([path], memory) == found
    memory.write_text('{"cut off')
    assert digests([path], memory) == [hashlib.sha256(b"other").hexdigest()]
    nowhere = Path("/proc/no_cache/memory.json")
    assert digests([path], nowhere) == [hashlib.sha256(b"other").hexdigest()]
    folder = tmp_path / "no_file"
    folder.mkdir()
    assert digests([folder], memory) == [""], "what cannot be read is the reader's to tell"


def test_shards_hold_the_configured_number_of_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", text=[f"t{n}" for n in range(25)])
    prepared(tmp_path, config(path, shard_rows=10))
    shards = corpus.read_shards(tmp_path / "corpus/unlabeled")
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [10, 10, 5]


def test_a_source_larger_than_a_bucket_gives_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"t{n % 400}" for n in range(1000)]
    path = write_parquet(tmp_path / "rows.parquet", text=texts)
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    whole = prepared(tmp_path / "1", config(path))
    monkeypatch.setattr(corpus, "_BUCKET_BYTES", 100)
    assert prepared(tmp_path / "2", config(path)) == whole


def test_a_job_on_a_bad_source_leaves_no_corpus(tmp_path: Path) -> None:
    done = run_job(
        "prepare", str(QUICKSTART), f"runs={tmp_path}/runs", f"corpus.source={tmp_path}/no"
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("runs/quickstart/corpus-*"))


def test_an_empty_cell_is_a_row_without_gold(tmp_path: Path) -> None:
    source = tmp_path / "half.csv"
    source.write_text("text,label\nfirst,1\nsecond,\nthird,0\n")
    counts, splits, aside = prepared(tmp_path, config(source, gold_column="label"))
    rows = [row for split in splits.values() for row in split]
    assert {row["text"]: row["gold"] for row in rows} == {
        "first": "good",
        "second": None,
        "third": "bad",
    }
    assert (counts.rejected, aside) == (0, [])
