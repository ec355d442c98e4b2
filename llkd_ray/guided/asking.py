"""Ask a round's student: about the seed, for the report, and about what the teacher wrote.

Shape legend: N rows, C classes.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config import Experiment
from llkd_ray.guided.evaluation import Report, report_on
from llkd_ray.guided.seed import SHARD, VALIDATION, read_seed
from llkd_ray.guided.shown import Answered
from llkd_ray.selection import Probabilities
from llkd_ray.student.evaluate import predict
from llkd_ray.student.temperature import UNCHANGED, as_trained, read_temperature


def report_of(
    student: Path, seed: Path, experiment: Experiment, parts: Sequence[str] = (VALIDATION,)
) -> tuple[Report, Answered]:
    """Ask a student about parts of the seed, and judge it.

    Its loss is that of before its temperature, which was fitted on rows of this kind.
    """
    names = experiment.task.label_names
    rows = read_seed(seed, parts, names)
    answers = np.concatenate(
        [probabilities_of(student, seed / part, experiment) for part in parts], dtype=np.float32
    )
    told = as_trained(answers, read_temperature(student) or UNCHANGED)
    return report_on(rows.gold, told, names), Answered(rows.texts, rows.gold, answers)


def probabilities_of(student: Path, split: Path, experiment: Experiment) -> Probabilities:
    """Return a student's probabilities of a folder of shards, [N, C]."""
    names = experiment.task.label_names
    answers = predict(
        student,
        split,
        names,
        max_length=experiment.student.max_length,
        batch_size=experiment.train.scoring_batch_size,
    )
    empty = np.empty((0, len(names)), dtype=np.float32)
    return np.concatenate([empty, *(of_batch for _, of_batch in answers)])


def probabilities_of_texts(
    texts: Sequence[str], student: Path, experiment: Experiment
) -> Probabilities:
    """Return a student's probabilities of texts, [N, C]."""
    with tempfile.TemporaryDirectory(prefix="llkd_ray-") as folder:
        table = pa.table({"row_id": [str(at) for at in range(len(texts))], "text": list(texts)})
        pq.write_table(table, Path(folder) / SHARD)
        return probabilities_of(student, Path(folder), experiment)
