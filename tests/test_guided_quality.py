"""What the benchmark of guided distillation asks for, and how it reads the rounds."""

import sys

import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, ROOT, Run
from test_guided_rounds import lay_out_written, prepared, rows_of, with_untrained_student

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

import guided_quality

from llkd_ray.artifacts import Rows, make
from llkd_ray.config import load_experiment
from llkd_ray.errors import CorpusError
from llkd_ray.guided.rounds import make_lessons


def test_every_variant_is_an_experiment_of_every_data_set(tmp_path):
    for data in guided_quality.SPLITS:
        (tmp_path / data).mkdir()
        (tmp_path / data / "train.parquet").touch()
        overrides = guided_quality.overrides_of(tmp_path / data, tmp_path)
        for settings in guided_quality.VARIANTS.values():
            load_experiment(ROOT / f"jobs/configs/{data}.toml", [*overrides, *settings])


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    with pytest.raises(CorpusError, match="there are trec6, snips"):
        guided_quality.overrides_of(tmp_path / "trec", tmp_path)
    with pytest.raises(CorpusError, match=r"no train\.parquet"):
        guided_quality.overrides_of(tmp_path / "trec6", tmp_path)


def a_round(number, loss, accuracy, **more):
    bounded = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    test = {"accuracy": bounded, "macro_f1": bounded}
    return {"round": number, "loss": loss, "written": 0, "kept": 0, "test": test, **more}


def test_a_line_is_of_the_rounds_with_the_lowest_loss_and_counts_all_that_was_written():
    guided = [
        [
            a_round(0, 0.9, 0.6),
            a_round(1, 0.5, 0.8, written=10, kept=4, dropped={"too long": 6}, tokens=99),
            a_round(2, 0.7, 0.9, written=10, kept=6, dropped={"too short": 4}, tokens=1),
        ],
        [a_round(0, 0.4, 0.7), a_round(1, 0.6, 0.5, written=20, kept=20)],
    ]
    line = guided_quality.line_of([of[guided_quality.best_of(of)] for of in guided], guided)
    assert line["accuracy"] == 0.75
    assert (line["accuracy_low"], line["accuracy_high"]) == (0.65, 0.85)
    assert (line["written"], line["kept"], line["tokens"]) == (20, 15, 50)
    assert line["dropped"] == {"too long": 3, "too short": 2}
    assert (line["last_accuracy"], line["last_accuracy_sd"]) == (0.7, pytest.approx(0.2828))
    assert (line["gain"], line["gain_sd"]) == (0.1, pytest.approx(0.1414))
    alone = guided_quality.line_of([of[0] for of in guided], guided, rounds=0)
    assert (alone["accuracy"], alone["written"], alone["round"]) == (0.65, 0, 0)
    assert "seed alone" in guided_quality.table_of("trec6", {"seed alone": alone, "teacher": {}})


def test_what_the_judge_says_has_a_line_for_each_variant_and_reason():
    judged = {"kept": {"texts": 9, "as_asked": 0.5}, "too long": {"texts": 3, "as_asked": 1.0}}
    table = guided_quality.judged_table("trec6", {"seed alone": {}, "guided": {"judged": judged}})
    _, *lines = table.splitlines()
    assert [line.split() for line in lines] == [
        ["guided", "kept", "9", "0.500"],
        ["guided", "too", "long", "3", "1.000"],
    ]


def test_the_judge_reads_every_text_that_was_written_whatever_became_of_it(tmp_path, small_encoder):
    run = Run((f"runs={tmp_path}", "guide.seed_rows=100", f"student.model={small_encoder}"))
    lineage = prepared(run)
    with_untrained_student(lineage)
    rows = rows_of(lineage, "unlabeled")[100:140]
    read = [row | {"read": row["gold"], "finished": at > 2} for at, row in enumerate(rows)]
    lay_out_written(lineage, read)
    make_lessons(lineage, 1)
    with make(lineage.guided) as draft:
        draft.rows, draft.details = Rows(taken=40, kept=40, rejected=0), {"rounds": 1}

    # The round's own student, which has told its labels already, in the judge's place.
    judge = lineage.round(0).path / "model"
    judged = guided_quality.judged(QUICKSTART, [list(run.overrides)], judge)

    samples = pq.read_table(lineage.lessons(1).path / "samples.parquet").to_pylist()
    assert {"kept", "no end"} <= judged.keys()
    for reason, found in judged.items():
        of = [row for row in samples if (row["dropped"] or "kept") == reason]
        right = sum(row["student_label"] == row["label"] for row in of)
        assert found == {"texts": len(of), "as_asked": round(right / len(of), 4)}
    assert sum(found["texts"] for found in judged.values()) == len(samples) == 40
    assert guided_quality.score_of(QUICKSTART, list(run.overrides), judge)["accuracy"] < 0.5
