"""Measure student and teacher from outside: latency, throughput, cost."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment

if TYPE_CHECKING:
    from llkd_ray.bench.load import Measure, Measurement
    from llkd_ray.schema import BenchSummary

ENDPOINTS: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")


def bench(experiment: Experiment) -> None:
    from llkd_ray.artifacts import Rows, make, write_text
    from llkd_ray.bench import cost, load
    from llkd_ray.bench.machine import this_machine
    from llkd_ray.lineage import Lineage

    lineage = Lineage(experiment)
    for needed in (lineage.corpus, lineage.labels, lineage.served):
        needed.require()
    artifact = lineage.bench
    if artifact.made:
        print(f"bench: {artifact.path} is there already")
        return
    section = experiment.bench
    texts = read_texts(lineage.corpus.path, experiment.serve.max_text_chars)
    measures = load.plan(list(texts), section)
    prices = {"student": section.student_usd_per_hour, "teacher": section.teacher_usd_per_hour}
    with make(artifact) as draft:
        measured = measure(experiment, measures)
        summaries = {name: cost.summarize(measured[name], prices[name]) for name in ENDPOINTS}
        summary = cost.compare(summaries["teacher"], summaries["student"])
        write_samples(draft.folder / "samples.parquet", measured)
        write_text(draft.folder / "bench.json", summary.model_dump_json(indent=2) + "\n")
        samples = [sample for item in measured.values() for sample in item.samples]
        answered = sum(sample.status == 200 for sample in samples)
        draft.rows = Rows(taken=len(samples), kept=answered, rejected=len(samples) - answered)
        asked = {text for item in measures[1:] for request in item.requests for text in request}
        draft.details = {
            "machine": this_machine(),
            "distinct_texts": len(asked),
            **{name: cost.details(measured[name], texts) for name in ENDPOINTS},
        }
    print_table(summary, draft.details)
    print(
        f"bench: wrote {artifact.path}: the student is {summary.speedup:.1f} times as fast on 64 "
        f"texts and {summary.cost_ratio:.1f} times as cheap; {len(samples) - answered} of "
        f"{len(samples)} requests failed"
    )


def measure(experiment: Experiment, measures: "list[Measure]") -> "dict[str, Measurement]":
    """Measure one endpoint after the other; two at once would share the machine."""
    from llkd_ray.bench import load
    from llkd_ray.cluster import ray_session
    from llkd_ray.progress import progress

    section = experiment.bench
    urls = {"student": section.student_url, "teacher": section.teacher_url}
    token = os.environ.get(experiment.serve.token_env) if experiment.serve.token_env else None
    total = sum(len(request) for item in measures for request in item.requests)
    measured = {}
    connected: AbstractContextManager[None] = nullcontext()
    if None in urls.values():
        connected = ray_session(experiment.ray)
    with connected:
        for name in ENDPOINTS:
            with (
                endpoint(experiment, name, urls[name]) as url,
                progress(f"bench {name}", "texts", total) as bar,
            ):
                measured[name] = load.measure(
                    url,
                    name,
                    measures,
                    timeout_s=section.request_timeout_s,
                    token=token,
                    advance=bar.update,
                )
    return measured


def endpoint(
    experiment: Experiment, name: Literal["student", "teacher"], url: str | None
) -> AbstractContextManager[str]:
    """Hold an endpoint's URL: one that serves already, or one deployed for the block."""
    if url is not None:
        return nullcontext(url)

    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.deploy import running
    from llkd_ray.serving.targets import application_of

    app = application_of(name, Lineage(experiment), experiment.serve)
    return running(app, experiment.serve, free_port=True)


def read_texts(corpus: Path, max_chars: int) -> dict[str, str | None]:
    """Return texts with their gold: the test split's first, then unlabeled ones without.

    The student was trained on the unlabeled split, so its gold would say nothing here.
    """
    import pyarrow.parquet as pq

    from llkd_ray.corpus import read_shards

    texts: dict[str, str | None] = {}
    for split in ("test", "unlabeled"):
        for shard in read_shards(corpus / split):
            table = pq.read_table(shard, columns=["text", "gold"])
            gold = table["gold"].to_pylist() if split == "test" else [None] * len(table)
            texts.update(
                (text, label)
                for text, label in zip(table["text"].to_pylist(), gold, strict=True)
                if len(text) <= max_chars
            )
            if len(texts) > 20_000:  # More than any bench sends: no need to read them all.
                return texts
    return texts


def write_samples(path: Path, measured: "dict[str, Measurement]") -> None:
    """Write every request as a row of schema.SAMPLES."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llkd_ray import schema

    rows = [sample._asdict() for item in measured.values() for sample in item.samples]
    pq.write_table(pa.Table.from_pylist(rows, schema.SAMPLES), path)


def print_table(summary: "BenchSummary", details: "dict[str, Any]") -> None:
    """Print the two endpoints side by side."""
    print("          p50 ms   p95 ms  64 texts s  texts/s    USD/M  accuracy")
    for name in ENDPOINTS:
        item, accuracy = getattr(summary, name), details[name]["accuracy"]
        print(
            f"{name:8} {item.latency_ms.p50:7.1f}  {item.latency_ms.p95:7.1f} "
            f"{item.batch64_s:11.3f} {item.texts_per_s:8.1f} {item.cost_usd_per_million:8.3f}  "
            f"{'-' if accuracy is None else format(accuracy, '.3f'):>8}"
        )


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), bench))
