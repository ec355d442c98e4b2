"""What goes wrong in other people's files: every row of it is kept, or named with a reason."""

import json
import logging
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_corpus import config, prepared, write_parquet

from llkd_ray import corpus, sources
from llkd_ray.corpus import _Aside
from llkd_ray.errors import CorpusError, TooManyRejectedError

NO_SPLIT = {"validation_fraction": 0.0, "test_fraction": 0.0}
FORMATS = pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
RIGHT_TO_LEFT = "\u05e9\u05dc\u05d5\u05dd \u200f\u0627\u0644\u0639\u0627\u0644\u0645"
EMOJI = "\U0001f469\u200d\U0001f52c\U0001f1ea\U0001f1fa\ufe0f e\u0301"
BREAKS = 'two\nlines\r\nand, "quotes" \t\u2028\x85.'


def write(path: Path, texts: list[str]) -> Path:
    """Write a file of one text column in the format of its name."""
    if path.suffix == ".parquet":
        write_parquet(path, text=texts)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        quoted = (text.replace('"', '""') for text in texts)
        path.write_text("".join(f'"{text}"\n' for text in ("text", *quoted)), newline="")
    return path


def damage(path: Path, row_group: int) -> None:
    """Overwrite a page of a Parquet file."""
    column = pq.read_metadata(path).row_group(row_group).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + 300] = b"\xff" * 300
    path.write_bytes(content)


@FORMATS
def test_strange_texts_come_through_unchanged(tmp_path: Path, suffix: str) -> None:
    texts = [RIGHT_TO_LEFT, EMOJI, BREAKS, "null \x00 byte", "\x00", "=1+1", "12", "NULL", "nan"]
    _, splits, rejected = prepared(tmp_path, config(write(tmp_path / f"rows.{suffix}", texts)))
    assert {row["text"] for row in splits["unlabeled"]} == set(texts)
    assert all(row["row_id"] == corpus.row_id(row["text"]) for row in splits["unlabeled"])
    assert rejected == []


@FORMATS
def test_a_text_of_ten_megabytes_is_kept_aside_unless_allowed(tmp_path: Path, suffix: str) -> None:
    long = "word " * 2_000_000 + "end"
    path = write(tmp_path / f"rows.{suffix}", ["before", long, "after"])
    for limit, kept in ((20_000, {"before", "after"}), (20_000_000, {"before", long, "after"})):
        folder = tmp_path / str(limit)
        folder.mkdir()
        counts, splits, rejected = prepared(folder, config(path, max_text_chars=limit))
        assert {row["text"] for row in splits["unlabeled"]} == kept
        assert counts.rejected == 3 - len(kept)
        assert [(row["where"], row["content"]) for row in rejected] == [
            (f"rows.{suffix}:1", long[:200])
        ][: counts.rejected]


@FORMATS
def test_a_text_that_is_not_unicode_is_kept_aside(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        raw = pa.array([b"fine", b"br\xffken"]).view(pa.string())
        write_parquet(path, text=raw, gold=pa.array([b"1", b"\xfe"]).view(pa.string()))
    elif suffix == "csv":
        path.write_bytes(b"text,gold\nfine,1\nbr\xffken,\xfe\n")
    else:
        path.write_text('{"text": "fine", "gold": "1"}\n{"text": "br\\ud8ffken", "gold": null}\n')
    _, splits, rejected = prepared(tmp_path, config(path, gold_column="gold", **NO_SPLIT))
    assert [row["text"] for split in splits.values() for row in split] == ["fine"]
    shown = "br\\ud8ffken" if suffix == "jsonl" else "br\\udcffken"
    assert rejected == [
        {
            "where": f"rows.{suffix}:1",
            "reason": "the text is not valid Unicode",
            "content": shown,
        }
    ]


def test_gold_that_is_not_unicode_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,gold\nfine,1\nodd,\xfe\n")
    _, _, rejected = prepared(tmp_path, config(path, gold_column="gold", **NO_SPLIT))
    assert [row["reason"] for row in rejected] == ["gold value '\\udcfe' is not among task.labels"]


@FORMATS
def test_text_of_white_space_alone_is_kept_aside(tmp_path: Path, suffix: str) -> None:
    blanks = [" ", "\t\n", "\u3000\u00a0", "\u2028"]
    path = write(tmp_path / f"rows.{suffix}", [*blanks, "fine"])
    counts, _, rejected = prepared(tmp_path, config(path))
    assert [row["reason"] for row in rejected] == ["the text is empty"] * len(blanks)
    assert counts.rows.kept == 1


def test_what_is_no_json_is_kept_aside_line_by_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "fine"}',
        b'{"text": 12}',
        b'{"text": ["a"]}',
        b'{"text": true}',
        b'{"text": "cut off',
        b'{"text": "raw \x00 byte"}',
        b'{"text": "latin \xe9"}',
        b'{"text": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe\x00",
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    counts, _, rejected = prepared(tmp_path, config(tmp_path / "rows.jsonl"))
    assert [row["reason"] for row in rejected] == [
        "the text is not text but int",
        "the text is not text but list",
        "the text is not text but bool",
        *["the line is not JSON"] * 6,
    ]
    assert counts.read == len(lines) == counts.rejected + counts.rows.kept


def test_broken_csv_lines_are_named_in_their_places(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,y\r\na,1\r\n\r\nb\xff,1,extra\r\nc\r\n"d ""q""",1\r\n')
    counts, splits, rejected = prepared(tmp_path, config(path))
    assert {row["text"] for row in splits["unlabeled"]} == {"a", 'd "q"'}
    assert [(row["where"], row["reason"]) for row in rejected] == [
        ("rows.csv:1", "the line has 3 columns, not 2"),
        ("rows.csv:2", "the line has 1 columns, not 2"),
    ]
    assert counts.read == 4


def test_many_copies_of_a_text_are_one_text_in_little_memory(tmp_path: Path) -> None:
    text = "the same words again " * 30
    path = write_parquet(tmp_path / "rows.parquet", text=pa.array([text] * 100_000))
    tracemalloc.start()
    counts, splits, _ = prepared(tmp_path, config(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (counts.read, counts.duplicates, len(splits["unlabeled"])) == (100_000, 99_999, 1)
    # The copies are 63 MB of text.
    assert peak < 20_000_000


BROKEN_FILES = {
    "empty.parquet": b"",
    "footer.parquet": b"PAR1 this is none",
    "empty.csv": b"",
    "blank.csv": b"\n\n",
    "column.csv": b"other\na\n",
    "twice.csv": b"text,text\na,b\n",
    "column.jsonl": b'{"other": "a"}\n',
}


def break_parquet(folder: Path) -> None:
    """Add Parquet files that are cut, lack the column, or hold another type in it."""
    write_parquet(folder / "type.parquet", text=[1, 2])
    write_parquet(folder / "column-too.parquet", other=["a"])
    write_parquet(folder / "footer-too.parquet", text=["a"] * 100)
    write_parquet(folder / "cut.parquet", text=["a"] * 100)
    content = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(content[: len(content) // 2])
    (folder / "footer-too.parquet").write_bytes(content[:-40] + b"\xff" * 32 + content[-8:])


def test_each_unreadable_file_stops_the_job_with_its_name(tmp_path: Path) -> None:
    for name, content in BROKEN_FILES.items():
        (tmp_path / name).write_bytes(content)
    break_parquet(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        folder = tmp_path / f"{path.name}.d"
        folder.mkdir()
        path.rename(folder / path.name)
        write(folder / "good.jsonl", ["fine"])
        with pytest.raises(CorpusError, match=r"corpus\.skip_unreadable_files=true") as raised:
            list(sources.read(config(folder)))
        assert str(folder / path.name) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_unreadable_files_are_left_out_and_named_where_the_experiment_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in BROKEN_FILES.items():
        (folder / name).write_bytes(content)
    break_parquet(folder)
    broken = sorted(str(path) for path in folder.iterdir())
    write(folder / "a.parquet", ["a"])
    write(folder / "b.csv", ["b"])
    write(folder / "z.jsonl", ["z"])
    write_parquet(folder / "none.parquet", text=pa.array([], pa.string()))
    (folder / "none.csv").write_text("text\n")
    with caplog.at_level(logging.WARNING, "llkd_ray"):
        counts, splits, rejected = prepared(tmp_path, config(folder, skip_unreadable_files=True))
    assert sorted(row["text"] for row in splits["unlabeled"]) == ["a", "b", "z"]
    assert [row["where"] for row in rejected] == broken
    assert {row["reason"] for row in rejected} == {"the file cannot be read"}
    assert len(caplog.messages) == len(broken)
    for row, message in zip(rejected, caplog.messages, strict=True):
        assert row["content"][:100] in message
        assert row["where"] in message
    assert (counts.read, counts.rejected) == (3 + len(broken), len(broken))


def test_unreadable_files_alone_are_an_error_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    one = config(tmp_path / "a.parquet", skip_unreadable_files=True)
    with pytest.raises(CorpusError, match=r"a\.parquet: not a readable parquet file"):
        list(sources.read(one))
    (tmp_path / "b.csv").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"none of 2 files can be read: .*a\.parquet: not a"):
        list(sources.read(config(tmp_path, skip_unreadable_files=True)))


def test_rows_before_a_damaged_page_are_kept_and_the_file_is_named(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(20_000)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=5000, use_dictionary=False)
    damage(path, 2)
    with pytest.raises(CorpusError, match=r"rows\.parquet: not a readable parquet file"):
        list(sources.read(config(path)))
    twice = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        twice.append(prepared(tmp_path / name, config(path, skip_unreadable_files=True)))
    assert twice[0] == twice[1]
    counts, splits, rejected = twice[0]
    kept = {row["text"] for row in splits["unlabeled"]}
    assert kept == set(texts[: len(kept)])
    assert 5000 <= len(kept) <= 10_000
    assert [row["where"] for row in rejected] == [str(path)]
    assert counts.read == len(kept) + 1


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    ("header", "row", "opening"), [("text,y", "fine,1", '"open,1'), ("y,text", "1,fine", '1,"open')]
)
def test_a_quote_left_open_loses_no_row_without_a_word(
    tmp_path: Path, header: str, row: str, opening: str, end: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([header, row, row, opening, *[row] * 2000]) + end)
    told = r"rows\.csv: a quote is opened in line 4 and not closed"
    with pytest.raises(CorpusError, match=told):
        list(sources.read(config(path)))
    # A later row whose quotes are in order closes it, and opens another one.
    for later in ('"text, quoted",1', '1,"text, quoted"'):
        path.write_text("\n".join([header, row, row, opening, *[row] * 9, later, row]) + end)
        with pytest.raises(CorpusError, match=told):
            list(sources.read(config(path)))
    path.write_text("\n".join([header, row, row, opening]) + end)
    with pytest.raises(CorpusError, match=told):
        list(sources.read(config(path)))
    path.write_text("\n".join([header, row, opening + '"', *[row] * 2000]) + end)
    assert len(list(sources.read(config(path)))) == 2002


def test_signs_behind_a_closed_quote_stay_part_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,y\n"He" said so,1\n"two\nlines",2\n"a ""b""",3\n')
    rows = list(sources.read(config(tmp_path / "rows.csv", gold_column="y")))
    assert [row.text for row in rows] == ["He said so", "two\nlines", 'a "b"']
    assert [row.gold for row in rows] == ["1", "2", "3"]


def test_hidden_files_are_not_read_and_links_to_nothing_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "_rows"  # The source itself may be called so.
    for name in (".ipynb_checkpoints", "_temporary"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rows-old.csv").write_text("text\nold\n")
    (folder / "._rows.csv").write_text("text\nold\n")
    (folder / "rows.csv").write_text("text\nnew\n")
    assert [row.text for row in sources.read(config(folder))] == ["new"]
    assert "left out 3 files that are hidden or do not end in" in caplog.text
    (folder / "more.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(CorpusError, match=r"more\.csv: a link to a file that is not there"):
        list(sources.read(config(folder)))
    rows = list(sources.read(config(folder, skip_unreadable_files=True)))
    assert len(rows) == 2
    assert len(sources.identity(config(folder), tmp_path / "cache")) == 2


def test_reasons_without_end_are_counted_in_bounded_memory(tmp_path: Path) -> None:
    aside = _Aside(tmp_path / "rejected.parquet")
    for number in range(5000):
        aside.add("where", f"gold value {number} is not among task.labels", "text")
    aside.close()
    assert len(aside._reasons) <= 1001
    assert aside._reasons.total() == aside.rows == 5000
    assert aside.commonest().startswith("for other reasons (4000)")


def test_a_quote_left_open_is_told_before_the_end_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,y\nfine,1\n"open,1\n' + "and on,1\n" * 2000)
    monkeypatch.setattr(sources, "_MAX_LINE", 10_000)
    with pytest.raises(CorpusError, match=r"rows\.csv: not a readable csv file: field larger"):
        list(sources.read(config(path)))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_without_line_ends_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(sources, "_MAX_LINE", 1000)
    (tmp_path / f"rows.{suffix}").write_bytes(b"\x00\x01" * 10_000)
    with pytest.raises(CorpusError, match="a line is longer than 1000"):
        list(sources.read(config(tmp_path / f"rows.{suffix}")))


def test_a_header_that_is_not_unicode_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"t\xffext\na\n")
    with pytest.raises(CorpusError, match=r"rows\.csv: no column 'text'") as raised:
        list(sources.read(config(tmp_path / "rows.csv")))
    str(raised.value).encode()


def test_rows_with_gold_may_come_after_rows_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c", "gold": "1"}\n{"text": "d"}\n')
    source = config(path, gold_column="gold")
    assert [row.gold for row in sources.read(source)] == [None, None, "1", None]
    with pytest.raises(CorpusError, match=r"no column 'glod'.*set corpus\.gold_column"):
        list(sources.read(config(path, gold_column="glod")))
    # Of a file that goes on for hours it is said before its end.
    monkeypatch.setattr(sources, "_OBJECTS_WITHOUT_GOLD", 2)
    with pytest.raises(CorpusError, match="no column 'gold'"):
        list(sources.read(source))


def test_a_label_column_of_numbers_is_not_taken_for_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "t{n}", "label": {n % 2}}}\n' for n in range(9)))
    source = config(path, text_column="label").model_copy(update={"max_rejected_fraction": 0.1})
    with pytest.raises(TooManyRejectedError, match=r"the text is not text but int \(9\)"):
        prepared(tmp_path, source)


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_is_text_however_arrow_stores_it(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_parquet(
        tmp_path / "rows.parquet",
        text=pa.array(["a", "b", None]).cast(kind),
        gold=pa.array(["1", "0", None]).cast(kind),
    )
    rows = list(sources.read(config(path, gold_column="gold")))
    assert [(row.text, row.gold) for row in rows] == [("a", "1"), ("b", "0"), (None, None)]
