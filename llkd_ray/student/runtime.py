"""What computes an exported student: torch, or ONNX Runtime on a CPU.

Shape legend: N texts, C classes, B texts and L tokens of a pass.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import DecodeError, Message

from llkd_ray.errors import StudentError
from llkd_ray.metrics import softmax
from llkd_ray.selection import Ints
from llkd_ray.student.batches import Tokens, pad
from llkd_ray.student.model import load_student

Floats = npt.NDArray[np.float64]
Network = Callable[[dict[str, torch.Tensor]], npt.NDArray[np.float32]]
"""Takes `input_ids` and `attention_mask` [B, L], returns logits [B, C]."""

FLOAT32, INT8 = "model.onnx", "model.int8.onnx"
"""Files of a student's ONNX folder; there is no INT8 where it was refused."""
_CPU = torch.device("cpu")


def onnx_file(folder: Path, backend: Literal["auto", "torch", "onnx", "onnx-int8"]) -> Path | None:
    """Return the file for ONNX Runtime, or None where torch computes.

    Args:
        folder: Of an exported student: plain, or made by `student.onnx`.
        backend: auto takes float32, or torch where there is no file for ONNX Runtime.

    Raises:
        StudentError: The backend's file is not there.
    """
    if backend == "torch":
        return None
    name = INT8 if backend == "onnx-int8" else FLOAT32
    if (folder / name).is_file():
        return folder / name
    if backend == "auto":
        return None
    raise StudentError(
        f"serve.backend = {backend!r}: {folder} holds no {name}; where int8 was refused, the "
        "manifest there has the figures and export.max_accuracy_drop and export.max_changed the "
        "limits; backend 'auto' serves what there is"
    )


def torch_network(folder: Path, device: torch.device = _CPU) -> Network:
    """Load a plain student into torch.

    Raises:
        StudentError: It cannot be loaded.
    """
    model, _ = load_student(folder)
    model.to(device)

    def compute(batch: dict[str, torch.Tensor]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        answered: npt.NDArray[np.float32] = logits.float().cpu().numpy()
        return answered

    return compute


def onnx_network(file: Path, threads: int) -> Network:
    """Load a student into ONNX Runtime, on the CPU.

    Args:
        file: FLOAT32 or INT8 of a student's ONNX folder.
        threads: That compute a pass, the caller's among them.

    Raises:
        StudentError: The file is no such model, or points to data outside of itself.
    """
    import onnxruntime

    content = file.read_bytes()
    _refuse_external_data(content, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A thread that spins while it waits keeps Serve's proxy from the core, and on shared cores
    # the very sibling that it waits for: it doubled the CPU time and the p50 of 64 texts.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # Errors; its warnings are about its own optimizations.
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # Its errors have no other common class.
        raise StudentError(f"{file}: ONNX Runtime does not load it: {error}") from error

    def compute(batch: dict[str, torch.Tensor]) -> npt.NDArray[np.float32]:
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        answered: npt.NDArray[np.float32] = logits
        return answered

    return compute


def probabilities(
    network: Network, tokens: Tokens, pad_token_id: int, passes: Iterable[Ints]
) -> Floats:
    """Return the probabilities [N, C] of N texts, N at least 1.

    Args:
        network: What computes.
        tokens: Of the texts.
        pad_token_id: Of the tokenizer.
        passes: Which texts share a pass; each text is in one.
    """
    parts = [(chosen, network(pad(tokens, chosen, pad_token_id, _CPU))) for chosen in passes]
    logits = np.empty((len(tokens), parts[0][1].shape[1]), dtype=np.float64)
    for chosen, part in parts:
        logits[chosen] = part
    return softmax(logits)


def cut_passes(lengths: Ints, max_texts: int, max_tokens: int) -> Iterator[Ints]:
    """Yield positions of texts of like length, shortest first, that share a padded pass.

    Args:
        lengths: [N], tokens of each text.
        max_texts: Texts of a pass at most.
        max_tokens: Tokens of a pass at most, padding included; a text that is longer goes alone.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        # Sorted by length, so the next text would be the longest of the pass.
        if end < len(order):
            texts = end + 1 - start
            if texts <= max_texts and texts * lengths[order[end]] <= max_tokens:
                continue
        yield order[start:end]
        start = end


def _refuse_external_data(content: bytes, file: Path) -> None:
    """Raise for a model that would have ONNX Runtime read other files.

    Nothing else in a model reaches outside: code for operators of one's own must be registered
    by the program, and this one registers none.
    """
    import onnx

    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise StudentError(f"{file}: this is no ONNX model") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise StudentError(
            f"{file}: its weights stand in other files, which are not read; export the student "
            "again with jobs/train.py"
        )


def _tensors(message: Message) -> Iterator[Any]:
    """Yield every tensor in a model, in subgraphs and functions too."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _tensors(inner)
