"""Make a student fast on CPUs: ONNX in float32, and in int8 where its answers hold.

Both are compared with torch on real rows. float32 must give torch's answers, or nothing is
exported; int8 may differ within the limits of the experiment, or its file is not kept.

Shape legend: N rows, C classes, B rows and L tokens of a batch.
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from llkd_ray.artifacts import Rows
from llkd_ray.config import ExportSection
from llkd_ray.corpus import read_shards
from llkd_ray.errors import StudentError
from llkd_ray.selection import NONE, Ints
from llkd_ray.student.batches import Tokens, tokenize
from llkd_ray.student.model import load_student
from llkd_ray.student.runtime import (
    FLOAT32,
    INT8,
    Floats,
    Network,
    cut_passes,
    onnx_network,
    probabilities,
    torch_network,
)

_TOLERANCE = 1e-4
"""By how much probabilities of float32 may differ from torch's: rounding makes about 1e-6."""
_PASS_TOKENS = 512
# The sizes of the example the graph is traced with mean nothing, except that 0 and 1 are special.
_EXAMPLE = (2, 7)


@dataclass(frozen=True)
class Exported:
    """What an export was, for the manifest."""

    rows: Rows
    """Rows that the networks were compared on."""
    details: dict[str, Any]
    """split; gold_rows; float32_max_difference (of a probability, from torch's);
    float32_accuracy and int8_accuracy (None without gold), int8_changed (share of rows with another
    prediction than float32's), both of int8 in the worse of two cases: rows in company, rows alone;
    int8 (accepted, or why not)."""

    @property
    def summary(self) -> str:
        """What became of int8, in one line."""
        found = self.details
        if found["int8_changed"] is None:
            return f"float32 only: {found['int8']}"
        figures = f"{found['int8_changed']:.1%} of predictions changed"
        if found["int8_accuracy"] is not None:
            figures = (
                f"accuracy {found['int8_accuracy']:.3f} (float32 {found['float32_accuracy']:.3f}), "
                + figures
            )
        rows = f"{self.rows.kept} {found['split']} rows"
        instead = "" if found["int8"] == "accepted" else "; onnx-int8 is not served"
        return f"int8 {found['int8']}: {figures} on {rows}{instead}"


@dataclass(frozen=True)
class _Sample:
    split: str
    gold: Ints
    """[N], positions of the classes, or NONE."""
    tokens: Tokens
    pad_token_id: int

    def answers(self, network: Network, max_texts: int | None = None) -> Floats:
        """Return the network's probabilities [N, C], in passes of so many texts at most."""
        passes = cut_passes(self.tokens.lengths, max_texts or len(self.gold), _PASS_TOKENS)
        return probabilities(network, self.tokens, self.pad_token_id, passes)

    def accuracy(self, answers: Floats) -> float | None:
        """Return the share of rows with gold that are answered right, None without any."""
        known = self.gold != NONE
        if not known.any():
            return None
        return float(np.mean(answers[known].argmax(axis=1) == self.gold[known]))


def export_onnx(
    student: Path,
    out: Path,
    *,
    corpus: Path,
    section: ExportSection,
    max_length: int,
) -> Exported:
    """Turn a plain student folder of any kind into one for ONNX Runtime.

    Reads:
        corpus/SPLIT/shard-*.parquet (schema.TEXT), of the first split with rows: test,
        validation, unlabeled.

    Writes:
        out: config.json, the tokenizer, FLOAT32 and, where accepted, INT8.

    Args:
        student: Plain Hugging Face folder.
        out: The folder to make; what an earlier try left there is replaced.
        corpus: Folder of the corpus artifact.
        section: Whether there is an int8 network, and its limits.
        max_length: Tokens of a text that the student reads.

    Raises:
        StudentError: The student cannot be loaded or exported, or answers otherwise when it is.
    """
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    model, tokenizer = load_student(student)
    tokenizer.save_pretrained(out)
    shutil.copyfile(student / "config.json", out / "config.json")
    _write_float32(model, out / FLOAT32, student)
    sample = _read_sample(corpus, section.max_rows, model.config.label2id, tokenizer, max_length)

    float32 = sample.answers(onnx_network(out / FLOAT32, 1))
    difference = float(np.abs(float32 - sample.answers(torch_network(student))).max())
    if not difference <= _TOLERANCE:  # Not a number is refused too.
        raise StudentError(
            f"{student}: the ONNX network's probabilities differ from torch's by {difference:.2g} "
            "on real rows; serve this student with serve.backend=torch"
        )
    details: dict[str, Any] = {
        "split": sample.split,
        "gold_rows": int((sample.gold != NONE).sum()),
        "float32_max_difference": difference,
        "float32_accuracy": sample.accuracy(float32),
        **_try_int8(out, section, sample, float32),
    }
    rows = len(sample.gold)
    return Exported(Rows(taken=rows, kept=rows, rejected=0), details)


def _try_int8(
    out: Path, section: ExportSection, sample: "_Sample", float32: Floats
) -> dict[str, Any]:
    """Leave an int8 network beside the float32 one if its answers hold; return what was found."""
    found: dict[str, Any] = {"int8_accuracy": None, "int8_changed": None}
    if not section.int8:
        return {**found, "int8": "export.int8 = false"}
    if not _write_int8(out / FLOAT32, out / INT8):
        return {**found, "int8": "it has no large matrix product, which is what int8 makes faster"}
    # Activations are scaled by the range of their pass, so int8's answers depend on which texts
    # share it. It is judged by the worse of two cases: in company, and each text alone.
    network = onnx_network(out / INT8, 1)
    answers = sample.answers(network), sample.answers(network, max_texts=1)
    predicted = float32.argmax(axis=1)
    changed = max(float(np.mean(int8.argmax(axis=1) != predicted)) for int8 in answers)
    before, scores = sample.accuracy(float32), map(sample.accuracy, answers)
    after = min((score for score in scores if score is not None), default=None)
    drop = None if before is None or after is None else before - after
    refused = refusal(section, drop=drop, changed=changed)
    if refused:
        (out / INT8).unlink()
    verdict = f"refused, {refused}" if refused else "accepted"
    return {"int8_accuracy": after, "int8_changed": changed, "int8": verdict}


def _write_float32(model: Any, file: Path, student: Path) -> None:
    ids = torch.ones(_EXAMPLE, dtype=torch.int64)
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                _Logits(model).eval(),
                (ids, torch.ones_like(ids)),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # What an architecture makes the exporter raise is anything.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StudentError(
            f"{student}: torch cannot export this student to ONNX: {reason}; serve it with "
            "serve.backend=torch"
        ) from error
    network = program.model_proto
    # The exporter's optimizations leave old shapes of what they rewrote behind (torch 2.13), and
    # quantization refuses a graph that contradicts itself.
    del network.graph.value_info[:]
    file.write_bytes(network.SerializeToString())


def _write_int8(float32: Path, file: Path) -> bool:
    """Quantize the weights of matrix products; return whether there is any.

    The activations' scales are found anew in each pass, so that no rows are needed here.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            float32,
            file,
            # Heads are Gemm: small, and nearest to the answer. They stay in float32.
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # 7 of the 8 bits: processors without VNNI add pairs of products in 16 bits, which
            # saturate with 8. So the answers compared here are those of any other machine.
            reduce_range=True,
        )
    network = onnx.load(file)
    if any(node.op_type == "MatMulInteger" for node in network.graph.node):
        return True
    file.unlink()
    return False


def _read_sample(
    corpus: Path, max_rows: int, label2id: dict[str, int], tokenizer: Any, max_length: int
) -> _Sample:
    """Read the first rows of the first split that has any; the order of its rows is by hash."""
    for split in ("test", "validation", "unlabeled"):
        texts: list[str] = []
        gold: list[str | None] = []
        for text, name in _rows(corpus / split):
            texts.append(text)
            gold.append(name)
            if len(texts) == max_rows:
                break
        if texts:
            positions = [NONE if name is None else label2id[name] for name in gold]
            tokens = tokenize(tokenizer, texts, max_length)
            return _Sample(split, np.array(positions), tokens, tokenizer.pad_token_id)
    raise StudentError(f"{corpus}: no row to compare the exported student on")


def _rows(split: Path) -> Iterator[tuple[str, str | None]]:
    for shard in read_shards(split):
        columns = pq.read_table(shard, columns=["text", "gold"]).to_pydict()
        yield from zip(columns["text"], columns["gold"], strict=True)


def refusal(section: ExportSection, *, drop: float | None, changed: float) -> str:
    """Return why int8 is refused, nothing if it is not.

    Args:
        section: The limits.
        drop: float32's accuracy minus int8's; None without gold, and only then `changed` decides.
        changed: Share of rows whose prediction differs.
    """
    if drop is None:
        limit = section.max_changed
        return f"changed {changed:.3g} > export.max_changed = {limit:g}" if changed > limit else ""
    limit = section.max_accuracy_drop
    return f"drop {drop:.3g} > export.max_accuracy_drop = {limit:g}" if drop > limit else ""


class _Logits(torch.nn.Module):
    """A student that returns its logits alone: what a graph has as its output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what the exporter and the quantizer say of their own insides."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
