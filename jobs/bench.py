"""Measure student and teacher from outside: latency, throughput, cost."""

import os
import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import TYPE_CHECKING

from llkd_ray.cli import run_job
from llkd_ray.config import Experiment, ServeTarget

if TYPE_CHECKING:
    from llkd_ray.bench.session import Target


def bench(experiment: Experiment) -> None:
    from llkd_ray.artifacts import make
    from llkd_ray.bench import table
    from llkd_ray.bench.load import measure
    from llkd_ray.bench.results import write_results
    from llkd_ray.bench.texts import read_texts
    from llkd_ray.lineage import Lineage
    from llkd_ray.progress import progress

    lineage = Lineage(experiment)
    cascade = [lineage.cascade] if "cascade" in experiment.bench.targets else []
    for needed in (lineage.corpus, lineage.labels, lineage.served, *cascade):
        needed.require()
    artifact = lineage.bench
    if artifact.made:
        print(f"bench: {artifact} is there already")
        return
    gold = read_texts(lineage.corpus.path, experiment.serve.max_text_chars)
    with make(artifact) as draft:
        measured = []
        # One endpoint after the other; two at once would share the machine.
        with closing(targets(experiment)) as each:
            for target in each:
                with progress(f"bench {target.name}", "texts") as bar:
                    measured.append(
                        measure(target, list(gold), experiment.bench, advance=bar.update)
                    )
        summary = write_results(draft, measured, experiment.bench, gold)
    ends = summary.endpoints.values()
    print("\n".join(table.lines(summary)))
    print(
        f"bench: wrote {artifact}: the student is {summary.speedup:.1f} times as fast on 64 "
        f"texts and {summary.cost_ratio:.1f} times as cheap; "
        f"{sum(end.failed for end in ends)} of {sum(end.requests for end in ends)} requests failed"
    )


def targets(experiment: Experiment) -> "Generator[Target, None, None]":
    """Yield each endpoint while it answers: those that serve already, and ours, deployed for it."""
    from llkd_ray.bench.session import Target
    from llkd_ray.cluster import ray_session
    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.ingress import environment_of

    section = experiment.bench
    own = _token(experiment.serve.token_env)
    others = [
        Target(other.name, other.url, other.protocol, token=_token(other.token_env))
        for other in section.others
    ]
    os.environ.update(environment_of(experiment.serve))  # Serve reads it when it is imported.
    from llkd_ray.serving.targets import model_name

    with ExitStack() as stack:
        if any(section.url_of(name) is None for name in section.targets):
            stack.enter_context(ray_session(experiment.ray))
        for name in section.targets:
            with endpoint(experiment, name) as url:
                model = model_name(name, Lineage(experiment))
                yield Target(name, url, kind=name, model=model, token=own)
    yield from others


def endpoint(experiment: Experiment, name: ServeTarget) -> AbstractContextManager[str]:
    """Hold an endpoint's URL: one that serves already, or one deployed for the block."""
    url = experiment.bench.url_of(name)
    if url is not None:
        return nullcontext(url)

    from llkd_ray.lineage import Lineage
    from llkd_ray.serving.deploy import running
    from llkd_ray.serving.targets import application_of

    app = application_of(name, Lineage(experiment), experiment.serve)
    return running(app, experiment.serve, free_port=True)


def _token(variable: str | None) -> str | None:
    from llkd_ray.serving.access import read_token

    return read_token(variable) if variable else None


if __name__ == "__main__":
    sys.exit(run_job(str(__doc__), bench))
