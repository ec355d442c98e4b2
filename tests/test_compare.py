"""Many ways of training, side by side on the same labels."""

import json

import numpy as np
import pytest
from conftest import QUICKSTART

from llkd_ray.compare.page import as_text
from llkd_ray.compare.table import tabulate
from llkd_ray.compare.trial import Trial
from llkd_ray.compare.variants import variants_of
from llkd_ray.config import load_experiment
from llkd_ray.errors import ConfigError
from llkd_ray.metrics import macro_f1

GOLD = np.arange(300) % 3


def trial(*errors, validation=None, held_out=None, kept=30):
    """A trial whose student is wrong on so many of the 300 rows after each epoch."""
    epochs = [
        {
            "kept": kept,
            "rows": 100,
            "steps": 4 * (at + 1),
            "row_steps": kept * (at + 1),
            "validation_macro_f1": validation and validation[at],
            "held_out_macro_f1": held_out and held_out[at],
        }
        for at in range(len(errors))
    ]
    predicted = np.stack(
        [np.where(np.arange(300) < wrong, (GOLD + 1) % 3, GOLD) for wrong in errors]
    )
    return Trial(epochs=epochs, audit=[], seconds=2.0, predicted=predicted)


def table(**trials):
    return tabulate(trials, GOLD, 3, baselines=("all", "random"), resamples=200, seed=0)


def test_each_criterion_chooses_its_own_epoch():
    one = trial(90, 30, 60, validation=[0.1, 0.2, 0.3], held_out=[0.3, 0.2, 0.1])
    by = {line.criterion: line for line in table(all=[one])}
    assert {name: line.epoch for name, line in by.items()} == {"gold": 3, "teacher": 1, "last": 3}
    assert by["gold"].accuracy == pytest.approx(0.8)
    assert by["teacher"].accuracy == pytest.approx(0.7)
    assert by["last"].best_macro_f1 == pytest.approx(macro_f1(GOLD, one.predicted[1], 3))
    assert by["last"].rows_used_fraction == pytest.approx(0.3)
    assert by["last"].row_steps == 90
    assert by["last"].steps == 12
    assert [line.criterion for line in table(all=[trial(1, 2)])] == ["last"]


def test_differences_are_paired_over_rows_and_averaged_over_seeds():
    lines = {
        line.variant: line
        for line in table(
            llkd=[trial(30), trial(42)], all=[trial(60), trial(60)], random=[trial(33)]
        )
    }
    mean = np.mean([macro_f1(GOLD, trial(wrong).predicted[0], 3) for wrong in (30, 42)])
    llkd = lines["llkd"]
    assert llkd.macro_f1 == pytest.approx(mean)
    assert llkd.macro_f1_sd > 0
    over = llkd.over["all"]
    assert over.value == pytest.approx(mean - lines["all"].macro_f1)
    assert 0 < over.low < over.value < over.high
    assert llkd.over["random"].low < 0 < llkd.over["random"].high
    assert "all" not in lines["all"].over


def test_the_table_has_the_best_first_within_each_criterion():
    lines = table(all=[trial(60)], llkd=[trial(30)])
    text = as_text(lines, {"accuracy": 0.5, "macro_f1": 0.25})
    names = [line.split()[0] for line in text.splitlines()]
    assert names == ["rule", "(teacher)", "llkd", "all"]
    assert "0.900 ±0.000" in text
    assert "0.250" in text


def test_variants_are_overrides_of_the_experiment():
    experiment = load_experiment(
        QUICKSTART,
        [
            "selection.teacher_decay=0.5",
            'compare.rules=["random", "llkd"]',
            'compare.variants.soft=["train.soft_targets=0.5"]',
            'compare.variants.top=["selection.rule=top-fraction"]',
        ],
    )
    variants = {variant.name: variant for variant in variants_of(experiment)}
    assert list(variants) == ["llkd", "soft", "top", "random"]
    assert variants["llkd"].experiment.selection.teacher_decay == 0.5
    assert variants["soft"].experiment.train.soft_targets == 0.5
    assert variants["soft"].experiment.selection.rule == "llkd"
    assert variants["top"].experiment.selection.rule == "top-fraction"
    assert [name for name, variant in variants.items() if variant.matched] == ["random"]
    assert all(variant.experiment.train.num_workers == 1 for variant in variants.values())


def test_a_comparison_that_cannot_be_meant_is_refused():
    for override, match in (
        ('compare.rules=["lkld"]', "did you mean llkd"),
        ("compare.seeds=[]", "at least one seed"),
        ("compare.variants={all=[]}", "rename one"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_experiment(QUICKSTART, [override])
    wrong = load_experiment(QUICKSTART, ['compare.variants={x=["train.epoch=2"]}'])
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        variants_of(wrong)


@pytest.mark.slow
def test_trials_are_run_once_and_random_keeps_as_many_rows_as_llkd(
    tmp_path,
    folders,
    small_encoder,
    ray_local,  # noqa: ARG001
):
    from llkd_ray.compare.run import compare

    labels, corpus = folders
    experiment = load_experiment(
        QUICKSTART,
        [
            f"student.model={small_encoder}",
            "student.max_length=64",
            "train.epochs=2",
            "train.stopping.held_out_fraction=0.1",
            'compare.variants={soft=["train.soft_targets=0.5"]}',
            "compare.seeds=[0, 1]",
            "evaluate.bootstrap_resamples=50",
        ],
    )
    first = compare(experiment, labels, corpus, tmp_path)
    assert first.test_rows == 60
    assert len(first.lines) == 3 * 4
    trials = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("trials/*.json")}
    assert len(trials) == 8
    for seed in (0, 1):
        kept = [
            [row["kept"] for row in trials[f"{rule}-seed-{seed}"]["epochs"]]
            for rule in ("llkd", "random")
        ]
        assert kept[0] == kept[1]
    assert "<svg" in (tmp_path / "curves.svg").read_text()

    (tmp_path / "trials/all-seed-1.json").unlink()
    before = (tmp_path / "trials/llkd-seed-0.npz").stat().st_mtime_ns
    again = compare(experiment, labels, corpus, tmp_path)
    assert (tmp_path / "trials/llkd-seed-0.npz").stat().st_mtime_ns == before
    assert (tmp_path / "trials/all-seed-1.json").is_file()
    for one, two in zip(first.lines, again.lines, strict=True):
        assert vars(one) | {"seconds": 0} == vars(two) | {"seconds": 0}
