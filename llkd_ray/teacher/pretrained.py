"""From a teacher setting to a folder that vLLM loads."""

import fcntl
import logging
import os
import shutil
from pathlib import Path

from llkd_ray import embedded
from llkd_ray.errors import TeacherError

_log = logging.getLogger(__name__)


def teacher_folder(model: str, cache: str) -> Path:
    """Return the folder of a teacher; an embedded one is converted on first use.

    Args:
        model: An embedded model's name, or a folder with safetensors and a tokenizer.
        cache: Folder for converted models.

    Raises:
        TeacherError: There is no such model.
    """
    if model in embedded.TEACHERS:
        return _converted(model, Path(cache).expanduser())
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        names = ", ".join(embedded.TEACHERS)
        raise TeacherError(
            f"teacher.model = {model!r}: neither an embedded model ({names}) nor a folder with a "
            "config.json"
        )
    if not list(folder.glob("*.safetensors")):
        raise TeacherError(
            f"teacher.model = {model!r}: no *.safetensors there; other weight formats can run "
            "code when loaded and are refused"
        )
    return folder.resolve()


def _converted(model: str, cache: Path) -> Path:
    """Turn a GGUF file into a folder with float32 safetensors, once per package version."""
    source = embedded.locate(embedded.TEACHERS[model])
    folder = cache / f"{model}-{embedded.revision(model).partition('==')[2]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Two jobs may want it at once; the second waits.
        if not folder.is_dir():
            _log.info("converting %s to safetensors, once, into %s", source.name, folder)
            beside = folder.with_name(folder.name + ".making")
            shutil.rmtree(beside, ignore_errors=True)
            _convert(source, beside)
            os.replace(beside, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    arguments = {"gguf_file": source.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **arguments)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **arguments)
    # The weights are plain float32 now; transformers refuses to save them while the model still
    # says that it is quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
