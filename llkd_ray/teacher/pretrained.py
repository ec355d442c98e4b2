"""From a model setting to a folder with safetensors."""

import contextlib
import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from llkd_ray import embedded
from llkd_ray.artifacts import make_once
from llkd_ray.errors import TeacherError

_log = logging.getLogger(__name__)

# A revision is part of the name, since answers of another one are another teacher's.
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+")
# Other weight formats can run code when they are loaded.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def teacher_folder(model: str, cache: str) -> Path:
    """Return the folder of a teacher; an embedded one is converted on first use.

    Args:
        model: An embedded model's name, a folder with safetensors and a tokenizer, or a model of
            the Hugging Face hub with its revision, NAME/MODEL@REVISION.
        cache: Folder for converted models.

    Raises:
        TeacherError: There is no such model.
    """
    if model in embedded.TEACHERS:
        return _converted(model, Path(cache).expanduser())
    return _named_folder("teacher.model", model, embedded.TEACHERS)


def encoder_folder(model: str, setting: str) -> Path:
    """Return the folder of an encoder that embeds texts.

    Args:
        model: An embedded encoder's name, a folder with safetensors and a tokenizer, or a model
            of the hub with its revision.
        setting: That names it, for the error.

    Raises:
        TeacherError: There is no such encoder.
    """
    if model in embedded.STUDENTS:
        return embedded.locate(embedded.STUDENTS[model])
    return _named_folder(setting, model, embedded.STUDENTS)


def is_on_hub(model: str) -> bool:
    """Return whether a setting names a model of the hub, and no folder of this machine."""
    return bool(_ON_HUB.fullmatch(model)) and not Path(model).expanduser().is_dir()


def from_hub(setting: str, model: str) -> Path:
    """Bring a model from the hub, or find it in the hub's own cache.

    Args:
        setting: That names it, for the error.
        model: NAME/MODEL@REVISION.

    Raises:
        TeacherError: The hub does not give it.
    """
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (HTTPError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TeacherError(
            f"{setting} = {model!r}: the hub did not give it, and it is not in its cache: "
            f"{reason}; check name, revision and HF_TOKEN, or give a folder"
        ) from None


def no_tokenizer(what: str, error: Exception) -> str:
    """Say that a model's folder has no tokenizer that can be loaded."""
    reason = str(error).strip().splitlines()[0]
    return f"{what}: no tokenizer can be loaded: {reason}; copy its tokenizer files there, too"


def _named_folder(setting: str, model: str, known: Iterable[str]) -> Path:
    folder = from_hub(setting, model) if is_on_hub(model) else Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"{setting} = {model!r}: neither an embedded model ({', '.join(known)}), nor a folder "
            "with a config.json, nor a model of the hub with its revision (NAME/MODEL@REVISION)"
        )
    if not list(folder.glob("*.safetensors")):
        raise TeacherError(
            f"{setting} = {model!r}: no *.safetensors there; other weight formats can run code "
            "when loaded and are refused"
        )
    return folder.resolve()


def _converted(model: str, cache: Path) -> Path:
    """Turn a GGUF file into a folder with float32 safetensors, once per package version."""
    folder = cache / f"{model}-{embedded.revision(model).partition('==')[2]}"

    def convert(beside: Path) -> None:
        _log.info("converting %s to safetensors, once, into %s", model, folder)
        gguf = beside / "model.gguf"
        embedded.write_whole(embedded.TEACHERS[model], gguf)
        _convert(gguf, beside)
        gguf.unlink()

    make_once(folder, convert)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    arguments = {"gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    if _adds_bos(gguf):
        # transformers 5.19 does not take this over from the file, and without its first token
        # Gemma answers nonsense.
        tokenizer.add_bos_token = True
    # The bar of the GGUF reader does not listen to the switch above.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **arguments)
    # The weights are plain float32 now; transformers refuses to save them while the model still
    # says that it is quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _adds_bos(gguf: Path) -> bool:
    """Read whether the model wants its beginning-of-sequence token before any text."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())
