import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUICKSTART
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray import embedded
from llkd_ray.config import load_experiment
from llkd_ray.digests import revision
from llkd_ray.errors import LLKDError, TeacherError
from llkd_ray.teacher.actor import Opening
from llkd_ray.teacher.embedding import Encoder
from llkd_ray.teacher.pretrained import encoder_folder, teacher_folder

CACHE = load_experiment(QUICKSTART).cache


@pytest.mark.parametrize("model", ["no-such-model", "."])
def test_a_model_that_is_not_there_is_told(model: str) -> None:
    with pytest.raises(TeacherError, match=r"teacher\.model"):
        teacher_folder(model, CACHE)
    with pytest.raises(TeacherError, match=r"teacher\.shots\.encoder"):
        encoder_folder(model, "teacher.shots.encoder")


def test_weights_that_can_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TeacherError, match=r"no \*\.safetensors"):
        teacher_folder(str(tmp_path), CACHE)


def test_weights_that_are_trained_further_are_another_model(tmp_path: Path) -> None:
    folder, moved = tmp_path / "model", tmp_path / "moved"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "chat_template.jinja"):
        (folder / name).write_text("first")
    first = revision(str(folder), tmp_path)
    shutil.copytree(folder, moved)
    assert revision(str(moved), tmp_path) == first
    (moved / "model.safetensors").write_text("other")  # Of the same size.
    assert revision(str(moved), tmp_path) != first
    assert revision("people/model@1", tmp_path) == "people/model@1"


def test_a_model_without_its_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    teacher = load_experiment(QUICKSTART, [f"teacher.model={tmp_path}"])
    with pytest.raises(TeacherError, match=r"teacher\.model = .*: no tokenizer can be loaded: "):
        Opening.of(teacher).prompt()
    with pytest.raises(TeacherError, match=r"calibration\.encoder = .*: no tokenizer"):
        Encoder(str(tmp_path), "calibration.encoder")


def test_a_cache_that_cannot_be_written_is_told() -> None:
    with pytest.raises(LLKDError, match=r"/proc/no_cache: cannot be written .* set cache=FOLDER"):
        teacher_folder("smollm2-135m-instruct", "/proc/no_cache")


def test_a_model_of_the_hub_is_taken_from_its_cache_by_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--people--their-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert teacher_folder(f"people/their-model@{commit}", str(tmp_path)) == snapshot.resolve()
    with pytest.raises(TeacherError, match="not in its cache"):
        teacher_folder(f"people/another@{commit}", str(tmp_path))
    with pytest.raises(TeacherError, match="with its revision"):
        teacher_folder("people/their-model", str(tmp_path))


@pytest.mark.parametrize("model", list(embedded.TEACHERS))
def test_an_embedded_teacher_is_the_file_that_was_pinned(model: str, tmp_path: Path) -> None:
    item = embedded.TEACHERS[model]
    embedded.write_whole(item, tmp_path / "whole")
    assert hashlib.sha256((tmp_path / "whole").read_bytes()).hexdigest() == item.sha256
    assert embedded.revision(model).startswith(f"{item.package}==")


def test_other_bytes_than_were_pinned_are_refused(tmp_path: Path) -> None:
    whole = embedded.TEACHERS["gemma3-270m"]
    with pytest.raises(LLKDError, match=r"another .* than was pinned"):
        embedded.write_whole(replace(whole, parts=whole.parts[::-1]), tmp_path / "whole")


def test_a_package_that_is_not_installed_is_told() -> None:
    with pytest.raises(LLKDError, match=r"no-such-package is not installed; run `bash"):
        embedded.locate(embedded.Embedded("no-such-package", "file", "none"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "bos"), [("smollm2-135m-instruct", None), ("gemma3-270m", 2)])
def test_a_converted_teacher_goes_on_with_sense(
    model: str, bos: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    folder = teacher_folder(model, CACHE)
    assert "de-quantizing" not in capfd.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer("x")["input_ids"][0] == bos) is (bos is not None)
    assert tokenizer("")["input_ids"] == ([] if bos is None else [bos])
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "France: Paris\nGermany: Berlin\nItaly:"
    with torch.inference_mode():
        logits = weights(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Rome"
