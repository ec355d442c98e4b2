"""How much faster and cheaper are students than the LLM that taught them, behind the same endpoint?

The quickstart's teacher labels its corpus once, and each rung of the ladder of students is trained
on those labels by the quickstart's rule. Then the teacher and one student after the other are
served by the same code on this machine, and the same client sends the same texts over HTTP. Each
encoder is served once more in int8, where its export to int8 was accepted.

What bounds a ratio stands beside it: what the student takes for 64 texts without HTTP, and how many
more multiplications the teacher does for a text. The ratio of an LLM of 8 billion parameters is a
projection and was not measured: the measured ratio times the multiplications of such an LLM for the
same tokens over those of this teacher, as if it ran on this machine at the same share of its speed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
import label_throughput
import student_ladder

from llkd_ray.config import BenchSection, Experiment, ServeTarget, load_experiment
from llkd_ray.errors import EndpointError
from llkd_ray.schema import EndpointSummary

JOBS = Path(__file__).parents[1]
QUICKSTART = JOBS / "configs/quickstart.toml"
BATCH = 64
CALLS = 20
# Where no run is given, --quick has no time to label all: the accuracies are of little training.
FEW = ("teacher.max_unlabeled_rows=320", "corpus.validation_fraction=0.03", "train.epochs=2")


def ladder(base: Experiment) -> dict[str, Experiment]:
    """Return the experiment of each rung; the first is the quickstart's own student."""
    found = {"encoder": base}
    for name, rung in student_ladder.rungs(base.student.model).items():
        if name in ("layers_3", "layers_1", "static"):
            train = base.train.model_copy(
                update={
                    "learning_rate": rung.learning_rate,
                }
            )
            found[name] = base.model_copy(update={"student": rung.student, "train": train})
        if name in ("encoder", "layers_3", "layers_1"):
            serve = base.serve.model_copy(update={"backend": "onnx-int8"})
            found[f"{name}_int8"] = found[name].model_copy(update={"serve": serve})
    return found


def is_served(experiment: Experiment) -> bool:
    """Return whether a trained rung can be served: int8 may have been refused."""
    from llkd_ray.errors import StudentError
    from llkd_ray.lineage import Lineage
    from llkd_ray.student.runtime import onnx_file
    from llkd_ray.student.train import MODEL

    try:
        onnx_file(Lineage(experiment).served.path / MODEL, experiment.serve.backend)
    except StudentError as error:
        print(f"left out: {error}", flush=True)
        return False
    return True


def measure_all(base: Experiment, names: list[str], bench: BenchSection) -> dict[str, Any]:
    """Make what is missing, measure the teacher and each student, and return the figures.

    Args:
        base: The quickstart.
        names: Rungs of the ladder.
        bench: What is measured.
    """
    sys.path.append(str(JOBS))
    import label
    import prepare
    import train

    from llkd_ray.bench.texts import read_texts
    from llkd_ray.cluster import ray_session
    from llkd_ray.lineage import Lineage

    students = {name: found for name, found in ladder(base).items() if name in names}
    prepare.prepare(base)
    lineage = Lineage(base)
    with ray_session(base.ray):
        label.label(base)
        for student in students.values():
            train.train(student)
        students = {name: found for name, found in students.items() if is_served(found)}
        gold = read_texts(lineage.corpus.path, base.serve.max_text_chars)
        teacher = measure("teacher", base, gold, bench)
        print(line("teacher", teacher), flush=True)
        ends = {}
        for name, student in students.items():
            ends[name] = measure("student", student, gold, bench)
            print(line(name, ends[name]), flush=True)
    flops = teacher_flops(base)
    rungs = {
        name: figures_of(end, teacher, student_flops(students[name], list(gold)), flops["teacher"])
        | {"inprocess_batch64_s": round(batch_s_in_process(students[name], list(gold)), 5)}
        for name, end in ends.items()
    }
    best = choose(rungs, _accuracy(teacher))
    print_tables(teacher, ends, rungs)
    times = flops["8b"] / flops["teacher"]
    ratio = rungs[best]["throughput_ratio"]
    print(
        f"projection, not measured: an LLM of 8 billion parameters does {flops['8b'] / 1e9:.0f} "
        f"GFLOP for a text, this teacher {flops['teacher'] / 1e9:.2f}: {times:.1f} times as many, "
        f"so {ratio:.1f} x {times:.1f} = {ratio * times:,.0f} times the throughput"
    )
    return {
        **{key: rungs[best][key] for key in ("throughput_ratio", "batch64_ratio", "cost_ratio")},
        "accuracy_student": rungs[best]["accuracy"],
        "accuracy_teacher": round(_accuracy(teacher), 4),
        "rung": best,
        "rungs": rungs,
        "teacher": {
            "batch64_s": round(teacher.batch64_s, 4),
            "texts_per_s": round(teacher.texts_per_s, 2),
            "gflop_per_text": round(flops["teacher"] / 1e9, 3),
        },
        "projection_8b": {
            "gflop_per_text": round(flops["8b"] / 1e9, 1),
            "times_this_teacher": round(times, 1),
            "throughput_ratio": round(ratio * times),
            "cost_ratio": round(rungs[best]["cost_ratio"] * times),
        },
    }


def measure(
    target: ServeTarget, experiment: Experiment, gold: dict[str, str | None], bench: BenchSection
) -> EndpointSummary:
    """Serve one endpoint, measure it, and take it down; Ray must be connected."""
    from llkd_ray.bench import load
    from llkd_ray.bench.cost import summarize
    from llkd_ray.bench.session import Target
    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.deploy import running
    from llkd_ray.serving.targets import application_of

    app = application_of(target, Lineage(experiment), experiment.serve)
    with running(app, experiment.serve, free_port=True) as url:
        measured = load.measure(Target(target, url, kind=target), list(gold), bench)
    summary = summarize(measured, bench, usd_per_hour=bench.usd_per_hour_of(target), gold=gold)
    if summary.failed:
        # Left out of all figures, they would make an endpoint faster, and judge it by other texts.
        raise EndpointError(f"{target}: {summary.failed} of {summary.requests} requests failed")
    return summary


def figures_of(
    student: EndpointSummary, teacher: EndpointSummary, flops: float, teacher_flops: float
) -> dict[str, Any]:
    """Set a student against the teacher."""
    return {
        "throughput_ratio": round(student.texts_per_s / teacher.texts_per_s, 2),
        "batch64_ratio": round(teacher.batch64_s / student.batch64_s, 2),
        "cost_ratio": round(teacher.cost_usd_per_million / student.cost_usd_per_million, 2),
        "accuracy": round(_accuracy(student), 4),
        "texts_per_s": round(student.texts_per_s, 1),
        "batch64_s": round(student.batch64_s, 5),
        "gflop_per_text": round(flops / 1e9, 5),
        "flops_ratio": round(teacher_flops / flops, 1),
    }


def choose(rungs: dict[str, dict[str, Any]], accuracy: float) -> str:
    """Return the fastest rung that is as right as the teacher, else the one that is most so."""
    as_right = [name for name, rung in rungs.items() if rung["accuracy"] >= accuracy]
    if as_right:
        return max(as_right, key=lambda name: float(rungs[name]["throughput_ratio"]))
    return max(rungs, key=lambda name: float(rungs[name]["accuracy"]))


def batch_s_in_process(experiment: Experiment, texts: list[str]) -> float:
    """Return the median seconds of 64 texts in the student alone, tokens included, without HTTP."""
    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.student import StudentClassifier
    from llkd_ray.student.train import MODEL

    folder = Lineage(experiment).served.path / MODEL
    student = StudentClassifier(folder, experiment.student.max_length, experiment.serve)
    seconds = []
    for call in range(CALLS):
        start = call * BATCH % max(1, len(texts) - BATCH)
        began = time.perf_counter()
        student.probabilities(texts[start : start + BATCH])
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[CALLS // 2]


def teacher_flops(base: Experiment) -> dict[str, float]:
    """Count what this teacher, and a Llama of 8 billion parameters, does for a text of the corpus.

    Source: the shape of Llama 3.1 8B, arXiv 2407.21783, Table 3.
    """
    from transformers import LlamaConfig

    from llkd_ray.lineage import Lineage

    details = Lineage(base).readouts.manifest().details
    rows = Lineage(base).readouts.manifest().rows.kept
    prompt = details["prompt_tokens"] / rows
    uncached = (details["prompt_tokens"] - details["cached_tokens"]) / rows
    large = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return {
        "teacher": label_throughput.model_flops_per_row(base, uncached, prompt),
        "8b": label_throughput.flops_per_row(large, uncached, prompt),
    }


def student_flops(experiment: Experiment, texts: list[str]) -> float:
    """Count two for every weight outside of the embeddings and every token of a text."""
    from llkd_ray.lineage import Lineage
    from llkd_ray.student.batches import tokenize
    from llkd_ray.student.model import load_student
    from llkd_ray.student.train import MODEL

    model, tokenizer = load_student(Lineage(experiment).student().path / MODEL)
    weights: int = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "embedding" not in name
    )
    lengths = tokenize(tokenizer, texts[:512], experiment.student.max_length).lengths
    return 2.0 * weights * float(lengths.mean())


def line(name: str, end: EndpointSummary) -> str:
    """Say what one endpoint reached."""
    return f"{name}: {end.texts_per_s:.1f} texts/s, 64 texts in {end.batch64_s:.4f} s"


def print_tables(
    teacher: EndpointSummary, ends: dict[str, EndpointSummary], rungs: dict[str, dict[str, Any]]
) -> None:
    """Print the endpoints side by side, then what bounds the ratios."""
    every = {"teacher": teacher, **ends}
    rows: list[list[Any]] = [
        ["64 texts, s", *(end.batch64_s for end in every.values())],
        ["texts/s", *(end.texts_per_s for end in every.values())],
        ["USD per million", *(end.cost_usd_per_million for end in every.values())],
        ["accuracy", *(_accuracy(end) for end in every.values())],
        ["throughput, times", 1.0, *(rung["throughput_ratio"] for rung in rungs.values())],
        ["64 texts, times", 1.0, *(rung["batch64_ratio"] for rung in rungs.values())],
        ["64 texts without HTTP, s", None, *(r["inprocess_batch64_s"] for r in rungs.values())],
        ["teacher's FLOPs over its own", 1.0, *(rung["flops_ratio"] for rung in rungs.values())],
    ]
    print(figures.table(["", *every], rows))


def _accuracy(end: EndpointSummary) -> float:
    assert end.accuracy is not None, "the quickstart's corpus has gold"
    return end.accuracy.value


def main() -> int:
    parser = figures.parser_of(__doc__, "the encoder alone, fewer requests, within four minutes")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", help="folder with a run of the quickstart, to go on from")
    arguments = parser.parse_args()
    quick = arguments.quick
    bench = BenchSection(
        single_requests=10 if quick else 50,
        batch_requests=5 if quick else 10,
        concurrency=(1, 2) if quick else (1, 2, 4),
        sweep_requests=6 if quick else 12,
        sweep_texts=BATCH,
        search_tries=0,
    )

    def benchmark() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            few = FEW if quick and not arguments.runs else ()
            base = load_experiment(QUICKSTART, [f"runs={arguments.runs or folder}", *few])
            names = ["encoder"] if quick else list(ladder(base))
            return measure_all(base, names, bench)

    return figures.run(benchmark)


if __name__ == "__main__":
    sys.exit(main())
