"""Is training as fast as PyTorch itself, do two workers halve it, and what does the method cost?

Four things go through the same rows, epoch by epoch in turn, so that a drift of the machine meets
them all; the first epoch of each warms up, and the medians of the others count:

- one worker of the training job, with every row kept;
- a bare PyTorch loop: same model, batches, order, loss, clipping, learning rates, seeds and
  threads, torch's own fused AdamW, with all batches padded before its clock starts. That both come
  to the same loss is checked;
- two workers, with as many threads each as the one has;
- two workers with the rule `llkd`: what scoring, selection and training cost of its epochs. A rule
  that keeps less trains less: shares of an epoch with every row kept would be lower.

Beside them, two bare loops with half of each batch that never exchange a gradient tell what two
processes can reach on this machine at all: the optimizer's work does not halve with the batch, so
the smaller it is (`--batch-size`), the less two workers gain. Other load on the machine falsifies
what two processes reach; measure on an idle one. The rows are TREC's questions; gold stands for the
teacher's labels, for a row's label does not change its speed.
"""

import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import figures

from llkd_ray import schema
from llkd_ray.config import AllRule, EncoderStudent, LLKDRule, TrainSection

THREADS = 1
# Of questions of a dozen tokens; as much work as 32 texts of a short paragraph.
BATCH_SIZE = 128


def measure(rows: int, rounds: int, train: TrainSection) -> dict[str, Any]:
    """Measure all of them and return the ratios."""
    from llkd_ray.student.worker import Work

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        labels = Path(folder) / "labels"
        names = write_labels(labels, rows)
        every = Work(
            labels=labels,
            validation=None,
            label_names=names,
            selection=AllRule(),
            student=EncoderStudent(),
            train=train,
            expert={},
            seed=0,
        )
        llkd = replace(every, selection=LLKDRule())

        def start(target: Callable[..., None], work: Work, world_size: int) -> Group:
            return stack.enter_context(processes(target, work, world_size))

        bare, one = start(train_bare, every, 1), start(train_ours, every, 1)
        apart, two = start(train_bare, every, 2), start(train_ours, every, 2)
        method = start(train_ours, llkd, 2)
        seconds: dict[str, list[float]] = {name: [] for name in ("bare", "one", "apart", "two")}
        shares: dict[str, list[float]] = {name: [] for name in ("scoring", "selection", "training")}
        for number in range(rounds):
            plain, ours = bare.epoch(), one.epoch()
            seconds["bare"].append(plain["training_s"])
            seconds["one"].append(ours["training_s"])
            assert abs(plain["loss"] / ours["loss"] - 1) < 1e-3, "not the same training"
            seconds["apart"].append(apart.epoch()["training_s"])
            seconds["two"].append(two.epoch()["training_s"])
            epoch = method.epoch()
            for name, values in shares.items():
                values.append(epoch[f"{name}_s"] / sum(epoch[f"{part}_s"] for part in shares))
            print(f"round {number + 1} of {rounds}", flush=True)
    rate = {name: rows / statistics.median(values) for name, values in seconds.items()}
    share = {name: statistics.median(values) for name, values in shares.items()}
    print(
        figures.table(
            ["", "rows/s", "over one worker"],
            [
                ["bare PyTorch", rate["bare"], rate["bare"] / rate["one"]],
                ["one worker", rate["one"], 1.0],
                ["two workers", rate["two"], rate["two"] / rate["one"]],
                ["two bare loops apart", rate["apart"], rate["apart"] / rate["one"]],
            ],
        )
    )
    print(figures.table(["an epoch of llkd", "share"], [[name, of] for name, of in share.items()]))
    return {
        "over_bare_torch": round(rate["one"] / rate["bare"], 3),
        "two_workers_over_one": round(rate["two"] / rate["one"], 3),
        "two_bare_apart_over_one": round(rate["apart"] / rate["bare"], 3),
        **{f"{name}_share": round(of, 4) for name, of in share.items()},
        "one_worker_rows_per_s": round(rate["one"], 1),
        "two_workers_rows_per_s": round(rate["two"], 1),
        "bare_rows_per_s": round(rate["bare"], 1),
        "batch_size": train.batch_size,
        "zero_stage": train.zero_stage,
        "threads_per_worker": train.threads_per_worker,
        "rounds": rounds,
        "rows": rows,
    }


def write_labels(folder: Path, rows: int) -> tuple[str, ...]:
    """Write distinct questions of TREC as labelled rows; return the names of the labels."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llkd_ray.embedded import CORPORA, locate

    lines = locate(CORPORA["trec"]).read_text(encoding="latin-1").splitlines()
    gold = {text: kind.partition(":")[0] for kind, _, text in (s.partition(" ") for s in lines)}
    names = tuple(sorted(set(gold.values())))
    random = np.random.default_rng(0)
    table = []
    for text, label in list(gold.items())[:rows]:
        rest = random.dirichlet(np.ones(len(names))) * random.uniform(0.1, 0.6)
        p = (rest + (1 - rest.sum()) * np.eye(len(names))[names.index(label)]).astype(np.float32)
        table.append(
            {
                "row_id": hashlib.sha256(text.encode()).hexdigest()[:32],
                "text": text,
                "gold": label,
                "label": label,
                "confidence": float(p.max()),
                "probabilities": p.tolist(),
                "logprobs": np.log(p).tolist(),
                "label_mass": 1.0,
            }
        )
    folder.mkdir()
    columns = schema.labels(len(names))
    pq.write_table(pa.Table.from_pylist(table, columns), folder / "shard-00000.parquet")
    return names


class Group:
    """Processes that go through an epoch together when told to."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes
        self._heard()

    def epoch(self) -> dict[str, Any]:
        """Return the first process's account of an epoch, at the seconds of the slowest."""
        for pipe in self._pipes:
            pipe.send(True)
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        rows = [pipe.recv() for pipe in self._pipes]
        return {**rows[0], "training_s": max(row["training_s"] for row in rows)}


@contextmanager
def processes(target: Callable[..., None], work: Any, world_size: int) -> Iterator[Group]:
    """Start processes and wait until each is through its first epoch; end them afterwards."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [spawn.Pipe() for _ in range(world_size)]
        started = [
            spawn.Process(target=target, args=(rank, world_size, Path(folder), work, ends[rank][1]))
            for rank in range(world_size)
        ]
        for process, (_, theirs) in zip(started, ends, strict=True):
            process.start()
            theirs.close()
        try:
            yield Group([ours for ours, _ in ends])
        finally:
            for ours, _ in ends:
                ours.close()
            for process in started:
                process.join()


def train_ours(rank: int, world_size: int, folder: Path, work: Any, pipe: Connection) -> None:
    """Be a worker of the training job that reports its epochs through a pipe."""
    import torch

    from llkd_ray.student.loop import train_worker
    from llkd_ray.student.worker import Context

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    meeting = (folder / "meeting").as_uri()
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size
    )

    def report(row: dict[str, Any] | None, _checkpoint: Path, _name: str) -> None:
        assert row is not None, "no checkpoint within an epoch was asked for"
        _told(pipe, row)

    device = torch.device("cpu")
    train_worker(Context(rank, world_size, device, report, None, folder / "signals"), work)


def train_bare(rank: int, world_size: int, _folder: Path, work: Any, pipe: Connection) -> None:
    """Be a PyTorch loop over the rows that a worker of the training job would have."""
    import numpy as np
    import torch

    from llkd_ray.student.batches import Share, pad, read_rows
    from llkd_ray.student.model import load_tokenizer, load_untrained, locate
    from llkd_ray.student.order import lanes_for, plan_epoch
    from llkd_ray.student.step import learning_rate

    train = work.train
    torch.set_num_threads(train.threads_per_worker)
    tokenizer = load_tokenizer(locate(work.student.model))
    lanes = lanes_for(train.batch_size)
    every = read_rows(
        work.labels,
        tokenizer,
        work.student.max_length,
        work.label_names,
        share=Share(0, 1, lanes),
    )
    rows = every.subset(Share(rank, world_size, lanes).of(every.lower))
    num_steps = -(-len(every) // train.batch_size)
    model = load_untrained(work.student, work.label_names, seed=work.seed).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=train.weight_decay, fused=True
    )
    for epoch in range(1, train.epochs + 1):
        plan = plan_epoch(
            rows.keys,
            rows.lower,
            rows.tokens.lengths,
            lanes=lanes,
            num_steps=num_steps,
            seed=work.seed,
            epoch=epoch,
        )
        batches = [
            (
                pad(rows.tokens, chosen, tokenizer.pad_token_id, torch.device("cpu")),
                torch.from_numpy(rows.label[chosen]),
                int(np.random.SeedSequence([work.seed, epoch, rank, step]).generate_state(1)[0]),
            )
            for step, chosen in enumerate(plan)
        ]
        loss_sum, started = 0.0, perf_counter()
        for step, (inputs, target, seed) in enumerate(batches):
            torch.manual_seed(seed)
            done = (epoch - 1 + (step + 0.5) / num_steps) / train.epochs
            optimizer.param_groups[0]["lr"] = learning_rate(train, done)
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, target)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += float(loss.detach()) * len(target)
        seconds = perf_counter() - started
        _told(pipe, {"training_s": seconds, "loss": loss_sum / len(rows)})


def _told(pipe: Connection, row: Any) -> None:
    """Tell of an epoch, then wait for leave to begin the next; end where nobody listens."""
    pipe.send(row)
    try:
        pipe.recv()
    except EOFError:
        sys.exit()


def main() -> int:
    parser = figures.parser_of(__doc__, "fewer rows and rounds, within four minutes")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--zero-stage", type=int, default=TrainSection().zero_stage)
    arguments = parser.parse_args()
    rows, rounds = (768, 3) if arguments.quick else (2048, 5)
    train = TrainSection(
        epochs=rounds + 1,
        batch_size=arguments.batch_size,
        zero_stage=arguments.zero_stage,
        threads_per_worker=THREADS,
    )
    return figures.run(lambda: measure(rows, rounds, train))


if __name__ == "__main__":
    sys.exit(main())
