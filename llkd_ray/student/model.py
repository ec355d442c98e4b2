"""Load the student of any kind: with a fresh head before training, a whole classifier after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from llkd_ray import embedded, storage
from llkd_ray.config import EncoderStudent, StaticStudent, StudentSection
from llkd_ray.errors import StudentError
from llkd_ray.student.architectures import MeanPooledClassifier, MeanPooledConfig, StaticClassifier
from llkd_ray.teacher.pretrained import from_hub, is_on_hub

TEMPERATURE = "confidence_temperature"
"""Key of an exported student's config.json: what its head was divided by."""
VECTORS = "embedding.weight"
"""Name of a static student's vectors in its file of weights."""
# What transformers raises at folders that are not what they should be.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)


def locate(model: str) -> Path:
    """Return the folder of an embedded encoder, of one of the hub, or of one the user names.

    Raises:
        StudentError: There is no such folder, or no safetensors weights in it.
        TeacherError: The hub does not give it.
    """
    if model in embedded.STUDENTS:
        folder = embedded.locate(embedded.STUDENTS[model])
    elif is_on_hub(model):
        folder = from_hub("student.model", model)
    else:
        folder = storage.here(Path(model).expanduser().resolve())
    if not (folder / "config.json").is_file():
        known = ", ".join(embedded.STUDENTS)
        raise StudentError(
            f"student.model = {model!r}: {folder} is no Hugging Face model folder (no config.json "
            f"in it); name such a folder, an embedded encoder ({known}), or a model of the hub "
            "with its revision (NAME/MODEL@REVISION)"
        )
    if not any(folder.glob("*.safetensors")):
        raise StudentError(
            f"student.model = {model!r}: {folder} holds no *.safetensors weights, and no other "
            "format is loaded; convert them with save_pretrained of transformers"
        )
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder.

    Raises:
        StudentError: There is none that transformers knows, or it cannot pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except _UNREADABLE as error:
        raise StudentError(f"{folder}: no tokenizer can be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        raise StudentError(f"{folder}: the tokenizer has no padding token; the student needs one")
    return tokenizer


def check_student(section: StudentSection) -> None:
    """Find out on the driver what would otherwise fail on every worker.

    Raises:
        StudentError: The model cannot be loaded as a classifier, has fewer layers or dimensions
            than are asked for, or reads fewer tokens than `student.max_length`.
    """
    folder = locate(section.model)
    tokenizer = load_tokenizer(folder)
    config = _load_config(folder)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise StudentError(
            f"{folder}: transformers knows no classifier of the kind {config.model_type!r}; "
            "choose an encoder such as BERT, RoBERTa, DeBERTa or MiniLM"
        )
    match section:
        case EncoderStudent(max_length=max_length):
            _cut(config, section, folder)
            positions = getattr(config, "max_position_embeddings", None)
            longest = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
            if max_length > longest:
                raise StudentError(
                    f"student.max_length = {max_length}: {folder} reads at most {longest} tokens"
                )
        case StaticStudent(dimensions=dimensions):
            most = getattr(config, "hidden_size", 0)
            if dimensions > most:
                raise StudentError(
                    f"student.dimensions = {dimensions}: a vector of {folder} has {most}"
                )


def load_untrained(section: StudentSection, label_names: Sequence[str], *, seed: int) -> Any:
    """Return the student with a freshly drawn head, in float32.

    Args:
        section: Which student; a static one names the folder of its distilled vectors.
        label_names: Names of the C classes, in the order of the head's outputs.
        seed: Of the head's first weights.

    Raises:
        StudentError: It cannot be loaded.
    """
    folder = locate(section.model)
    config = _load_config(folder)
    torch.manual_seed(seed)
    match section:
        case EncoderStudent(head=head, dropout=dropout):
            _cut(config, section, folder)
            _set_dropout(config, dropout)
            if head == "own":
                return _with_fresh_head(folder, _with_classes(config, label_names))
            whole = MeanPooledConfig(encoder=config.to_dict())
            _set_dropout(whole, dropout)
            encoder = load_encoder(folder, config)
            return MeanPooledClassifier(_with_classes(whole, label_names), encoder)
        case StaticStudent(head_units=head_units, dropout=dropout):
            config.head_units, config.head_dropout = head_units, dropout
            model = StaticClassifier(_with_classes(config, label_names))
            vectors = load_file(folder / "model.safetensors")[VECTORS]
            model.embedding.weight.data.copy_(vectors)
            return model


def load_encoder(folder: Path, config: Any = None) -> Any:
    """Return an encoder without a head, in float32.

    Args:
        folder: Of the model.
        config: Its configuration, where it is not the folder's own.

    Raises:
        StudentError: It cannot be loaded.
    """
    return _load_model(folder, config=config or _load_config(folder), as_a=AutoModel)


def load_student(folder: Path) -> tuple[Any, Any]:
    """Return model (in evaluation mode, float32) and tokenizer of an exported student of any kind.

    Raises:
        StudentError: The folder holds none.
    """
    folder = locate(str(folder))
    return _load_model(folder, config=_load_config(folder)).eval(), load_tokenizer(folder)


def _cut(config: Any, section: EncoderStudent, folder: Path) -> None:
    """Keep the first layers only: weights of the others are not read then."""
    if section.layers is None:
        return
    there = getattr(config, "num_hidden_layers", 0)
    if section.layers > there:
        raise StudentError(f"student.layers = {section.layers}: {folder} has {there}")
    config.num_hidden_layers = section.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: section.layers]


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    # Each architecture has its own names for its dropouts; all of them say what they are.
    for key, value in config.to_dict().items():
        if "dropout" in key and (value is None or isinstance(value, float)):
            setattr(config, key, dropout)


def _with_fresh_head(folder: Path, config: Any) -> Any:
    """Return the classifier of a folder without the head that the folder may have.

    Of a folder that holds a classifier, for these classes or for others, the encoder counts.
    """
    model, found = _load_model(
        folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    fresh = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    encoder = f"{model.base_model_prefix}."
    broken = sorted(key for key, *_ in found["mismatched_keys"] if key.startswith(encoder))
    if broken:
        raise StudentError(f"{folder}: the weights do not load: {broken[0]} has another shape")
    weights = dict(model.named_parameters())
    old = [key for key in weights if not key.startswith(encoder) and key not in fresh]
    if old:
        drawn = dict(AutoModelForSequenceClassification.from_config(config).named_parameters())
        for key in old:
            weights[key].data.copy_(drawn[key].data)
    return model


def _with_classes(config: Any, label_names: Sequence[str]) -> Any:
    vars(config).pop(TEMPERATURE, None)  # That of an earlier head.
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: position for position, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    return config


def _load_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _UNREADABLE as error:
        raise StudentError(f"{folder}: config.json cannot be read: {_first_line(error)}") from error


def _load_model(
    folder: Path, *, config: Any, as_a: Any = AutoModelForSequenceClassification, **how: bool
) -> Any:
    # transformers reports at length, as a warning, that a fresh head is fresh.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return as_a.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **how,
        )
    except _UNREADABLE as error:
        raise StudentError(f"{folder}: the weights do not load: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
