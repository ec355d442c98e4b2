"""Distil an encoder into one vector for each token, by model2vec, before any training.

Source: Minish Lab's model2vec. Each token is read by the encoder alone; the vectors are projected
onto their principal components and weighted down where tokens are frequent (Zipf's law).
"""

import contextlib
import hashlib
import io
import logging
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from llkd_ray.artifacts import make_once
from llkd_ray.config import StaticStudent
from llkd_ray.errors import StudentError
from llkd_ray.student.architectures import StaticConfig
from llkd_ray.student.model import VECTORS, load_encoder, load_tokenizer, locate

_log = logging.getLogger(__name__)
_NO_LIMIT = int(1e30)
"""What tokenizers say who cut nothing by themselves."""


def distilled(section: StaticStudent, cache: str) -> Path:
    """Return the folder of a static student before training; it is made on first use.

    Its tokenizer is the encoder's, so that a text has the same tokens for every kind of student.

    Args:
        section: Which encoder, and how many dimensions.
        cache: Folder for converted models.

    Raises:
        StudentError: The encoder cannot be loaded, or model2vec cannot distil it.
    """
    encoder = locate(section.model)
    version = metadata.version("model2vec")
    digest = hashlib.sha256(version.encode())
    for file in sorted(path for path in encoder.iterdir() if path.suffix != ".md"):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    name = f"static-{digest.hexdigest()[:16]}-{section.dimensions}"
    folder = Path(cache).expanduser().resolve() / name
    make_once(folder, lambda beside: _distil(encoder, section, beside))
    return folder


def _distil(encoder: Path, section: StaticStudent, folder: Path) -> None:
    from model2vec.distill import distill_from_model

    _log.info("distilling %s into token vectors, once; this takes a minute or so", encoder)
    tokenizer = load_tokenizer(encoder)
    try:
        # The bar has no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            static = distill_from_model(
                load_encoder(encoder),
                tokenizer,
                device="cpu",
                pca_dims=section.dimensions,
                quantize_to="float32",
            )
    except ValueError as error:
        raise StudentError(
            f"student.model = {section.model!r}: model2vec cannot distil it: {error}"
        ) from error
    position = tokenizer.get_vocab()
    vectors = torch.zeros(max(position.values()) + 1, section.dimensions)
    found = torch.from_numpy(static.embedding)
    for token, at in static.tokenizer.get_vocab().items():
        if token in position:
            vectors[position[token]] = found[at]
    # What every text has, or says that nothing is known, tells no texts apart.
    vectors[tokenizer.all_special_ids] = 0.0
    save_file({VECTORS: vectors}, folder / "model.safetensors")
    StaticConfig(vocab_size=len(vectors), dimensions=section.dimensions).save_pretrained(folder)
    tokenizer.model_max_length = _NO_LIMIT
    tokenizer.save_pretrained(folder)
