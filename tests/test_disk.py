"""What a job says when the disk is full; /dev/full is one that always is."""

from pathlib import Path

import pytest
from conftest import QUICKSTART

from llkd_ray.cli import run_job
from llkd_ray.cluster import each


def write(_: object) -> None:
    Path("/dev/full").write_text("something")


def in_a_ray_task(_: object) -> None:
    # Ray's workers cannot import this module, so the function goes to them by value.
    def fill(_: object) -> None:
        Path("/dev/full").write_text("something")

    list(each(fill, [0]))


@pytest.mark.parametrize("job", [write, pytest.param(in_a_ray_task, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_in_one_line(
    job, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if job is in_a_ray_task:
        request.getfixturevalue("ray_local")
    assert run_job("Fill the disk.", job, argv=[str(QUICKSTART), f"runs={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no space is left on the disk; make room")


def test_what_else_a_disk_says_keeps_its_traceback(tmp_path: Path) -> None:
    def read(_: object) -> None:
        (tmp_path / "nowhere").read_text()

    with pytest.raises(FileNotFoundError):
        run_job("Read.", read, argv=[str(QUICKSTART), f"runs={tmp_path}"])
