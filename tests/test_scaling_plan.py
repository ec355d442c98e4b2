"""The arithmetic of the scaling plan, on cases that are counted by hand."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

from scaling import Stage, simulate


def test_one_teacher_without_start_up_takes_rows_over_rate() -> None:
    times = simulate(Stage(rows=1000, actors=1, rows_per_s=10, start_up_s=0))
    assert times.wall_s == pytest.approx(100)
    assert (times.windows, times.files) == (1, 16)


def test_teachers_start_anew_for_every_window() -> None:
    times = simulate(Stage(rows=2 * 8000 * 128 * 64 + 1, actors=8, rows_per_s=100, start_up_s=60))
    assert times.windows == 3
    assert times.start_up_s == 180
    assert times.files == 8000 * 128
    assert times.driver_mb == pytest.approx(40)


def test_more_teachers_never_ask_longer_and_then_something_else_takes_longest() -> None:
    runs = [
        simulate(Stage(rows=20_000_000, actors=actors, rows_per_s=100)) for actors in (8, 64, 2048)
    ]
    asked = [run.ask_s for run in runs]
    assert asked == sorted(asked, reverse=True)
    assert [run.bottleneck for run in runs] == ["asking", "asking", "start-up"]


def test_sealing_grows_with_the_square_of_the_shards() -> None:
    few, many = (
        simulate(Stage(rows=rows, actors=1, rows_per_s=100, entry_s=1e-3)).seal_s
        for rows in (1_000_000, 10_000_000)
    )
    assert many == pytest.approx(100 * few)
