"""Training workers as real processes with gloo and DeepSpeed, around a small encoder."""

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training_data import NAMES

from llkd_ray.config import EncoderStudent, LLKDRule, TrainSection
from llkd_ray.errors import LLKDError
from llkd_ray.student.checkpoint import read_progress
from llkd_ray.student.loop import train_worker
from llkd_ray.student.model import load_tokenizer, locate
from llkd_ray.student.worker import Context, Work

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Workers are forks of one process that has imported everything: a start takes no seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["training_workers", "deepspeed", "transformers.models.bert.modeling_bert"]
)

TRAIN = TrainSection(
    num_workers=2, epochs=2, batch_size=16, scoring_batch_size=32, learning_rate=2e-4
)


def make_small_encoder(folder):
    """A BERT of two thin layers with the embedded student's tokenizer: seconds, not minutes."""
    from transformers import BertConfig, BertModel

    tokenizer = load_tokenizer(locate("minilm-l6"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def work_on(folders, encoder):
    labels, corpus = folders
    return Work(
        labels=labels / "unlabeled",
        validation=corpus / "validation",
        label_names=NAMES,
        selection=LLKDRule(),
        student=EncoderStudent(model=str(encoder), max_length=64, dropout=0.0),
        train=TRAIN,
        expert={},
        seed=3,
    )


def changed(work, *, rule=None, dropout=0.0, **train):
    return replace(
        work,
        selection=rule or work.selection,
        student=work.student.model_copy(update={"dropout": dropout}),
        train=TrainSection.model_validate({**work.train.model_dump(), **train}),
    )


def run_workers(out, work, world_size, *, restored=None, killed_at=None):
    """Train with real processes; each whole checkpoint is left in out/NAME.

    Returns the progress after the last epoch, or at the checkpoint after which all were killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as environment:
        # Python 3.11 does not tell the process its path, and it skips what it does not find.
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    meeting = out / f"meeting-{time.monotonic_ns()}"
    workers = [
        FORKS.Process(
            target=_main, args=((rank, world_size), meeting, work, out, (restored, killed_at))
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == (-signal.SIGKILL if killed_at else 0)
    return read_progress(out / (killed_at or max(path.name for path in out.glob("epoch-????"))))


def _main(place, meeting, work, out, fate):
    rank, world_size = place
    restored, killed_at = fate
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.distributed.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=world_size
    )

    def report(_row, folder, name):
        shutil.copytree(folder, out / name, dirs_exist_ok=True)
        torch.distributed.barrier()
        if name == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    context = Context(rank, world_size, torch.device("cpu"), report, restored, out / "signals")
    try:
        train_worker(context, work)
    except LLKDError as error:
        (out / f"error-{rank}").write_text(str(error))
        raise


def signals_of(out, epoch):
    """Rows of schema.SIGNALS of all workers together, by row id."""
    parts = (out / "signals").glob(f"epoch-{epoch:04d}-*.parquet")
    rows = pa.concat_tables(map(pq.read_table, parts)).to_pylist()
    found = {row["row_id"]: row for row in rows}
    assert len(rows) == len(found)
    return found


def kept_rows(out, epoch):
    return {row_id for row_id, row in signals_of(out, epoch).items() if row["kept"]}


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key[-2:] != "_s"} for row in rows]
