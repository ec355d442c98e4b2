"""What does each rung of the ladder of students cost and give: accuracy against texts per second?

Every student is trained by the product's own loop, in one process, for the same number of steps on
the same rows, by the rule `all`. Gold stands for the teacher's labels, so the accuracies are those
of a perfect teacher: they set the students side by side and say nothing of a distillation. Texts
per second are of the trained students, tokens included, one thread and batches of 64.

DATA is a folder with train.parquet and test.parquet, columns `text` and `label`; without one, the
embedded TREC questions.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import embedded, schema
from llkd_ray.config import (
    AllRule,
    EncoderStudent,
    StaticStudent,
    StoppingSection,
    StudentSection,
    TrainSection,
)
from llkd_ray.errors import CorpusError, StudentError
from llkd_ray.metrics import accuracy, macro_f1

BATCH = 64
MAX_LENGTH = 128
THREADS_TRAINING, THREADS_SPEED = 2, 1
SPEED_TEXTS = 256
ROUNDS = 3
"""How often the speed of each student is taken, in turns; the median counts."""


@dataclass(frozen=True)
class Rung:
    """A student and its learning rate, set by hand and not searched for."""

    student: StudentSection
    learning_rate: float


def rungs(model: str) -> dict[str, Rung]:
    """Return the ladder, from the slowest student to the fastest, by name."""
    return {
        "encoder": Rung(EncoderStudent(model=model), 1e-4),
        "encoder_mean": Rung(EncoderStudent(model=model, head="mean"), 1e-4),
        # With their own heads, cut encoders answered one class alone after 60 steps at 1e-4.
        "layers_3": Rung(EncoderStudent(model=model, layers=3, head="mean"), 2e-4),
        "layers_1": Rung(EncoderStudent(model=model, layers=1, head="mean"), 5e-4),
        "static": Rung(StaticStudent(model=model), 5e-3),
    }


@dataclass(frozen=True)
class Data:
    """Texts and gold labels."""

    names: tuple[str, ...]
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]


def embedded_data() -> Data:
    """Return the distinct TREC questions, a ninth of them for the test."""
    lines = embedded.locate(embedded.CORPORA["trec"]).read_text(encoding="latin-1").splitlines()
    found = {text: kind.partition(":")[0] for kind, _, text in (s.partition(" ") for s in lines)}
    rows = [(text, label) for text, label in found.items() if text]
    rows.sort(key=lambda row: _row_id(row[0]))
    cut = len(rows) // 9
    return Data(tuple(sorted({label for _, label in rows})), rows[cut:], rows[:cut])


def read_data(folder: Path) -> Data:
    """Read train.parquet and test.parquet.

    Raises:
        CorpusError: A file is missing, or has not the columns.
    """
    splits = []
    for split in ("train", "test"):
        try:
            table = pq.read_table(folder / f"{split}.parquet", columns=["text", "label"])
        except (OSError, pa.ArrowInvalid) as error:
            raise CorpusError(
                f"{folder}: no {split}.parquet with columns text and label: {error}"
            ) from error
        rows = {text: str(label) for text, label in zip(*table.to_pydict().values(), strict=True)}
        splits.append(sorted(rows.items(), key=lambda row: _row_id(row[0])))
    train, test = splits
    return Data(tuple(sorted({label for _, label in train})), train, test)


def measure(
    data: Data, ladder: dict[str, Rung], steps: int, cache: str, folder: Path
) -> dict[str, Any]:
    """Train every student, take accuracy and speed, and return the figures.

    Args:
        data: To train on and to score.
        ladder: Students by name, the first of which the speeds are set against.
        steps: Optimizer steps of 32 rows.
        cache: Folder for distilled vectors.
        folder: To work in.

    Raises:
        StudentError: The encoder cannot be loaded, or a training process died.
    """
    from llkd_ray.student.model import check_student
    from llkd_ray.student.train import found_from_anywhere

    trained, training_s = {}, {}
    rows = data.train[: steps * 32]
    write_labels(folder / "labels", rows, data.names)
    for name, rung in ladder.items():
        check_student(rung.student)
        student = found_from_anywhere(rung.student, cache, folder / "untrained")
        started = time.perf_counter()
        trained[name] = train(Rung(student, rung.learning_rate), steps, folder, data.names, name)
        training_s[name] = time.perf_counter() - started
    scores, speeds = ask(trained, data)
    found = {
        name: {
            **scores[name],
            "texts_per_s": round(statistics.median(whole for whole, _ in speeds[name]), 1),
            "model_texts_per_s": round(statistics.median(alone for _, alone in speeds[name]), 1),
            "training_s": round(training_s[name], 1),
        }
        for name in ladder
    }
    header = ["student", "parameters", "accuracy", "macro-F1", "texts/s", "model alone", "x"]
    lines = [
        [
            ladder[name].student.summary,
            *(of[key] for key in ("parameters", "accuracy", "macro_f1")),
            *(of[key] for key in ("texts_per_s", "model_texts_per_s")),
            round(of["texts_per_s"] / found[next(iter(found))]["texts_per_s"], 1),
        ]
        for name, of in found.items()
    ]
    print(figures.table(header, lines))
    return {
        "students": found,
        "steps": steps,
        "train_rows": len(rows),
        "test_rows": len(data.test),
        "batch": BATCH,
        "threads": THREADS_SPEED,
        "labels": "gold",
    }


def write_labels(folder: Path, rows: Sequence[tuple[str, str]], names: Sequence[str]) -> None:
    """Write rows as if a teacher that is always right had labelled them."""
    folder.mkdir()
    columns = schema.labels(len(names))
    lines = []
    for text, label in rows:
        sure = [1.0 if name == label else 0.0 for name in names]
        line: dict[str, Any] = {"row_id": _row_id(text), "text": text, "gold": label}
        line |= {"label": label, "confidence": 1.0, "probabilities": sure, "label_mass": 1.0}
        line |= {"logprobs": np.log(np.maximum(sure, 1e-6)).tolist()}
        lines.append({name: line.get(name) for name in columns.names})
    pq.write_table(pa.Table.from_pylist(lines, columns), folder / "shard-00000.parquet")


def train(rung: Rung, steps: int, folder: Path, names: tuple[str, ...], name: str) -> Path:
    """Train in a process of its own and return the folder of the student.

    Raises:
        StudentError: The process died.
    """
    worker = multiprocessing.get_context("spawn").Process(
        target=_train, args=(rung, steps, folder, names, folder / name)
    )
    worker.start()
    worker.join()
    if worker.exitcode:
        raise StudentError(f"training {name} ended with {worker.exitcode}; its traceback is above")
    return folder / name


def _train(rung: Rung, steps: int, folder: Path, names: tuple[str, ...], out: Path) -> None:
    import torch

    from llkd_ray.student.checkpoint import STUDENT
    from llkd_ray.student.loop import train_worker
    from llkd_ray.student.worker import Context, Work

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / f"meeting-{out.name}").as_uri(), rank=0, world_size=1
    )

    def keep(_row: Any, checkpoint: Path, _name: str) -> None:
        shutil.copytree(checkpoint / STUDENT, out, dirs_exist_ok=True)

    section = TrainSection(
        num_workers=1,
        steps=steps,
        batch_size=32,
        learning_rate=rung.learning_rate,
        threads_per_worker=THREADS_TRAINING,
        stopping=StoppingSection(choose_by="last"),
    )
    work = Work(
        labels=folder / "labels",
        validation=None,
        label_names=names,
        selection=AllRule(),
        student=rung.student.model_copy(update={"max_length": MAX_LENGTH}),
        train=section,
        expert={},
        seed=0,
    )
    train_worker(Context(0, 1, torch.device("cpu"), keep, None), work)


def ask(
    trained: dict[str, Path], data: Data
) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple[float, float]]]]:
    """Ask every student for the test rows.

    Returns:
        Parameters, accuracy and macro-F1 by student; and each round's texts/s, with tokenizing and
        without.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from llkd_ray.student.batches import tokenize
    from llkd_ray.student.evaluate import class_probabilities
    from llkd_ray.student.model import load_student

    torch.set_num_threads(THREADS_SPEED)
    students = {name: load_student(folder) for name, folder in trained.items()}
    texts = [text for text, _ in data.test]
    gold = np.array([data.names.index(label) for _, label in data.test])

    def answer(name: str, texts: list[str]) -> tuple[Any, float, float]:
        model, tokenizer = students[name]
        started = time.perf_counter()
        tokens = tokenize(tokenizer, texts, MAX_LENGTH)
        tokenized = time.perf_counter()
        probabilities = class_probabilities(
            model,
            tokens,
            batch_size=BATCH,
            pad_token_id=tokenizer.pad_token_id,
            num_classes=len(data.names),
            device=torch.device("cpu"),
        )
        ended = time.perf_counter()
        return probabilities, ended - started, ended - tokenized

    scores: dict[str, dict[str, Any]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in students}
    for name, (model, _) in students.items():
        predicted = answer(name, texts)[0].argmax(axis=1)  # The warm-up, too.
        scores[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "accuracy": round(accuracy(gold, predicted), 4),
            "macro_f1": round(macro_f1(gold, predicted, len(data.names)), 4),
        }
    for _ in range(ROUNDS):
        for name in students:
            # A fast student sees the texts several times: milliseconds cannot be timed.
            many = texts[:SPEED_TEXTS] * (20 if name == "static" else 1)
            _, whole_s, model_s = answer(name, many)
            speeds[name].append((len(many) / whole_s, len(many) / model_s))
    return scores, speeds


def _row_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def main() -> int:
    parser = figures.parser_of(
        __doc__, "100 steps, and no mean pooling of all layers, within four minutes"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of a data set")
    parser.add_argument("--model", default="minilm-l6", help="the encoder of all rungs")
    parser.add_argument("--steps", type=int, default=400, help="of 32 rows each")
    parser.add_argument("--cache", default="~/.cache/llkd_ray", help="for distilled vectors")
    arguments = parser.parse_args()
    ladder = rungs(arguments.model)
    if arguments.quick:
        del ladder["encoder_mean"]
    steps = 100 if arguments.quick else arguments.steps

    def benchmark() -> dict[str, Any]:
        data = read_data(arguments.data) if arguments.data else embedded_data()
        with tempfile.TemporaryDirectory() as folder:
            return measure(data, ladder, steps, arguments.cache, Path(folder))

    return figures.run(benchmark)


if __name__ == "__main__":
    sys.exit(main())
