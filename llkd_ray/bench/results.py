"""Write what was measured, as samples and as a summary."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.artifacts import Draft, Rows, write_text
from llkd_ray.bench import cost
from llkd_ray.bench.machine import this_machine
from llkd_ray.bench.measurement import Measurement
from llkd_ray.bench.session import OK
from llkd_ray.config import BenchSection


def write_results(
    draft: Draft,
    measured: Sequence[Measurement],
    bench: BenchSection,
    gold: Mapping[str, str | None],
) -> schema.BenchSummary:
    """Condense measurements into the draft of a bench artifact.

    Writes:
        samples.parquet (schema.SAMPLES), bench.json (schema.BenchSummary).

    Args:
        draft: Gets its rows and details here, too.
        measured: Of every endpoint.
        bench: What was measured.
        gold: Gold label of every text that was sent, None where it is not known.

    Raises:
        EndpointError: Not one request of a measure was answered.
    """
    samples = [sample for one in measured for sample in one.samples]
    rows = [sample._asdict() for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows, schema.SAMPLES), draft.folder / "samples.parquet")
    judged = cost.answered_by_all(measured, gold)
    summary = cost.compare(
        {
            one.endpoint: cost.summarize(
                one, bench, usd_per_hour=bench.usd_per_hour_of(one.endpoint), gold=judged
            )
            for one in measured
        },
        bench,
    )
    write_text(draft.folder / "bench.json", summary.model_dump_json(indent=2) + "\n")
    answered = sum(sample.status == OK for sample in samples)
    draft.rows = Rows(taken=len(samples), kept=answered, rejected=len(samples) - answered)
    draft.details = {
        "machine": this_machine(),
        "distinct_texts": len(judged),
        "texts_with_gold": sum(label is not None for label in judged.values()),
    }
    return summary
