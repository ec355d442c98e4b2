import os
import subprocess
import sys
from pathlib import Path

import pytest

from llkd_ray import artifacts
from llkd_ray.artifacts import Artifact, Rows, fingerprint, make, write_text
from llkd_ray.errors import ArtifactError


def artifact(run: Path, **settings: int) -> Artifact:
    return Artifact(run=run, noun="labels", job="label", settings=settings, inputs={"corpus": "c1"})


def break_off(failed: Artifact) -> None:
    def stage() -> None:
        with make(failed) as draft:
            (draft.folder / "part").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage()


def test_a_fingerprint_changes_with_content_and_not_with_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": 1}) != fingerprint({"b": 1})


def test_an_artifact_is_whole_with_its_manifest_or_not_there(tmp_path: Path) -> None:
    made = artifact(tmp_path, a=1)
    with make(made) as draft:
        (draft.folder / "x").write_text("content")
        assert not made.made
        draft.rows = Rows(taken=3, kept=2, rejected=1)
        draft.details = {"tokens": 7}
    assert made.made
    assert not made.making.exists()
    assert (made.path / "x").read_text() == "content"
    manifest = made.manifest()
    assert manifest.settings == {"a": 1}
    assert manifest.inputs == {"corpus": "c1"}
    assert manifest.rows.kept == 2
    assert manifest.details == {"tokens": 7}
    assert manifest.versions["ray"]
    assert manifest.seconds > 0


def test_a_stage_that_fails_leaves_nothing_a_reader_could_take(tmp_path: Path) -> None:
    failed = artifact(tmp_path, a=1)
    break_off(failed)
    assert not failed.made
    with make(failed) as draft:
        assert list(draft.folder.iterdir()) == []
        draft.rows = Rows(taken=0, kept=0, rejected=0)


def test_a_stage_that_resumes_finds_what_it_had_written(tmp_path: Path) -> None:
    failed = artifact(tmp_path, a=1)
    break_off(failed)
    with make(failed, resume=True) as draft:
        assert (draft.folder / "part").read_text() == "half"
        draft.rows = Rows(taken=0, kept=0, rejected=0)


def test_rows_that_do_not_add_up_are_never_committed(tmp_path: Path) -> None:
    wrong = artifact(tmp_path, a=1)
    with pytest.raises(AssertionError, match="rows got lost"), make(wrong) as draft:
        draft.rows = Rows(taken=3, kept=1, rejected=1)
    assert not wrong.made


def test_a_missing_input_names_both_fingerprints_and_the_job(tmp_path: Path) -> None:
    other, wanted = artifact(tmp_path, a=1), artifact(tmp_path, a=2)
    with pytest.raises(ArtifactError, match=r"run python jobs/label\.py"):
        wanted.require()
    with make(other) as draft:
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    with pytest.raises(ArtifactError) as caught:
        wanted.require()
    for part in (other.fingerprint, wanted.fingerprint, "jobs/label.py"):
        assert part in str(caught.value)
    assert other.require() is other


def test_two_processes_cannot_make_the_same_artifact(tmp_path: Path) -> None:
    wanted = artifact(tmp_path, a=1)
    program = (
        "import sys; from pathlib import Path\n"
        "from llkd_ray.artifacts import Artifact, make\n"
        f"wanted = Artifact(run=Path({str(tmp_path)!r}), noun='labels', job='label',"
        " settings={'a': 1}, inputs={'corpus': 'c1'})\n"
        "with make(wanted):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match="another process is making this"), make(wanted):
            pass
        holder.kill()
    with make(wanted) as draft:  # The lock goes with the process that held it.
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert wanted.made


def test_who_ends_second_leaves_what_the_first_has_made(tmp_path: Path) -> None:
    wanted = artifact(tmp_path, a=1)
    for name in ("first", "second"):  # The second had asked before the first was there.
        with make(wanted) as draft:
            (draft.folder / name).write_text(name)
            draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert (wanted.path / "first").is_file()
    assert not (wanted.path / "second").exists()
    assert not wanted.making.exists()


def test_what_lacked_its_name_alone_when_it_was_killed_is_made(tmp_path: Path) -> None:
    wanted = artifact(tmp_path, a=1)
    with make(wanted) as draft:
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    wanted.path.rename(wanted.making)
    assert wanted.made
    assert wanted.path.is_dir()
    assert not wanted.making.exists()


def test_where_there_is_no_git_a_stage_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    artifacts._commit.cache_clear()
    wanted = artifact(tmp_path, a=1)
    with make(wanted) as draft:
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert wanted.manifest().commit == ""
    artifacts._commit.cache_clear()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_copy_does_not_stand_in_the_way(tmp_path: Path) -> None:
    copied = artifact(tmp_path, a=1)
    copied.path.mkdir(parents=True)
    (copied.path / "part").write_text("of a copy that was broken off")
    assert not copied.made
    with make(copied) as draft:
        (draft.folder / "whole").write_text("whole")
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    assert copied.made
    assert not (copied.path / "part").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_is_made_once_is_found_where_nothing_can_be_written(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    (tmp_path / "made").mkdir()
    program = (
        "import os, pathlib; from llkd_ray.artifacts import make_once; os.seteuid(65534);"
        f"make_once(pathlib.Path({str(tmp_path / 'made')!r}), print)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
