"""What would labelling a billion rows take, and what breaks first?

No language model runs. A simulation of the stage (scaling.py) is given the ledger's costs as this
machine measures them on a local disk, and a teacher's rate that is stated, from FLOPs. Two of its
laws are checked, each measured at one point and predicted at another: that a look-up grows with the
ledger's folder; and how long the stage as a whole takes, by scripted teachers of a stated rate, for
which start-up is learned from a few rows and one teacher, and more rows and teachers are predicted.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
import pyarrow as pa
import scaling

from llkd_ray.config import load_experiment
from llkd_ray.teacher.ledger import Ledger

QUICKSTART = figures.JOBS / "configs/quickstart.toml"
_CLASSES = 6
_SCRIPTED_ROWS_PER_S = 100.0
_FEW_ROWS, _ROWS = 256, 4096
_TEACHERS = (1, 2, 4)
_SHARD_ROWS = 10_000
_BATCH_ROWS = 64


def measure(quick: bool, args: Any) -> dict[str, Any]:
    """Measure the ledger, check the look-up, print the plan."""
    small, large = (500, 2_000) if quick else (2_000, 20_000)
    with tempfile.TemporaryDirectory() as folder:
        compact_s, seal_s = shard_s(Path(folder) / "shard")
        entry_s = look_up_s(Path(folder) / "small", small) / small
        measured = look_up_s(Path(folder) / "large", large)
    predicted = entry_s * large
    print(f"look-up among {large} entries: predicted {predicted:.4f} s, measured {measured:.4f} s")
    checks = check_stage()
    print(
        figures.table(
            [f"{_ROWS} rows, scripted teachers", "predicted s", "measured s", "off by"],
            [[teachers, *times, times[0] / times[1] - 1] for teachers, times in checks.items()],
        )
    )
    rate = args.peak_tflops * 1e12 * args.utilisation / (2 * args.parameters * args.tokens)
    print(f"stated, not measured: {rate:.0f} rows/s of a GPU, {args.usd_per_hour:g} USD an hour")
    lines = []
    for gpus in (8, 64, 512):
        times = scaling.simulate(
            scaling.Stage(
                rows=args.rows,
                actors=gpus,
                rows_per_s=rate,
                entry_s=entry_s,
                compact_s=compact_s,
                seal_s=seal_s,
            )
        )
        held = (times.start_up_s + times.ask_s) / 3600 * gpus
        hours = [times.ask_s, times.start_up_s, times.compact_s, times.seal_s, times.wall_s]
        lines.append(
            [
                gpus,
                *(second / 3600 for second in hours),
                round(held),
                round(held * args.usd_per_hour),
                *(times.bottleneck, times.windows, times.files, times.driver_mb),
            ]
        )
    header = ["GPUs", "ask h", "start h", "compact h", "seal h", "wall h", "GPU h", "USD"]
    header += ["longest", "windows", "parts", "driver MB of blocks"]
    print(figures.table(header, lines))
    return {
        "look_up_error": round(predicted / measured - 1, 3),
        "stage_error": {
            teachers: round(times[0] / times[1] - 1, 3) for teachers, times in checks.items()
        },
        "rows_per_s_stated": round(rate, 1),
        "plan": [dict(zip(header, line, strict=True)) for line in lines],
    }


def check_stage() -> dict[int, tuple[float, float]]:
    """Return the seconds of the stage as simulated and as measured, by the number of teachers."""
    from llkd_ray.cluster import ray_session
    from llkd_ray.corpus import prepare

    checks = {}
    with tempfile.TemporaryDirectory() as folder:
        experiment = load_experiment(QUICKSTART, [f"runs={folder}"])
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        prepare(experiment.corpus, experiment.task, corpus)
        with ray_session(experiment.ray):
            stage_s(corpus, Path(folder) / "warm", _FEW_ROWS, 1)
            few_s = stage_s(corpus, Path(folder) / "few", _FEW_ROWS, 1)
            start_up_s = few_s - _FEW_ROWS / _SCRIPTED_ROWS_PER_S
            for teachers in _TEACHERS:
                stage = scaling.Stage(
                    rows=_ROWS,
                    actors=teachers,
                    rows_per_s=_SCRIPTED_ROWS_PER_S,
                    start_up_s=start_up_s,
                )
                measured = stage_s(corpus, Path(folder) / f"of-{teachers}", _ROWS, teachers)
                checks[teachers] = scaling.simulate(stage).wall_s, measured
    return checks


def stage_s(corpus: Path, folder: Path, rows: int, teachers: int) -> float:
    """Return the seconds in which scripted teachers label rows, from the call to the last seal."""
    from llkd_ray.teacher.actor import Opening
    from llkd_ray.teacher.readouts import read_out

    experiment = load_experiment(
        QUICKSTART,
        [
            "teacher.kind=scripted",
            f"teacher.rows_per_s={_SCRIPTED_ROWS_PER_S}",
            f"teacher.actors.min={teachers}",
            f"teacher.actors.max={teachers}",
            "teacher.actors.num_cpus=0.2",
            'teacher.splits=["unlabeled"]',
            f"teacher.max_unlabeled_rows={rows}",
        ],
    )
    folder.mkdir()
    ledger = Ledger(folder / "ledger", len(experiment.task.labels))
    ledger.open({})
    (folder / "readouts").mkdir()
    started = time.perf_counter()
    read_out(corpus, folder / "readouts", Opening.of(experiment), ledger)
    return time.perf_counter() - started


def look_up_s(folder: Path, entries: int) -> float:
    """Return the seconds of a look-up that finds nothing among so many compacted shards."""
    folder.mkdir()
    for number in range(entries):
        (folder / f"{number:016x}-{number:016x}-00000000.parquet").touch()
    ids = pa.array(["f" * 64])
    ledger = Ledger(folder, _CLASSES)
    started = time.perf_counter()
    for _ in range(5):
        ledger.find(ids)
    return (time.perf_counter() - started) / 5


def shard_s(folder: Path) -> tuple[float, float]:
    """Return the seconds of compacting a shard and of finding its answers again."""
    ledger = Ledger(folder, _CLASSES)
    ledger.open({})
    ids = [f"{number:064x}" for number in range(_SHARD_ROWS)]
    for start in range(0, _SHARD_ROWS, _BATCH_ROWS):
        part = ids[start : start + _BATCH_ROWS]
        columns = {"row_id": part, "logprobs": [[-1.0] * _CLASSES] * len(part)}
        numbers = {"prompt_tokens": 200, "cached_tokens": 0, "cut_tokens": 0}
        columns |= {name: [value] * len(part) for name, value in numbers.items()}
        columns |= {"error": [None] * len(part), "attempt": [1] * len(part)}
        ledger.write("0-f", pa.table(columns, schema=ledger.columns))
    started = time.perf_counter()
    ledger.compact("0-f")
    compacted = time.perf_counter()
    ledger.find(pa.array(ids))
    return compacted - started, time.perf_counter() - compacted


def main() -> int:
    parser = figures.parser_of(__doc__, "fewer entries in the ledger's folder; seconds")
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--tokens", type=float, default=200.0, help="uncached tokens of a row")
    parser.add_argument("--parameters", type=float, default=8e9, help="of the teacher")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="H100 SXM, dense bf16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of that peak, stated")
    parser.add_argument("--usd-per-hour", type=float, default=3.0, help="of a GPU, stated")
    args = parser.parse_args()
    return figures.run(lambda: measure(args.quick, args))


if __name__ == "__main__":
    sys.exit(main())
