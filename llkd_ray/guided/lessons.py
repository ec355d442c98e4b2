"""One round's rows: see what the student gets wrong, have more of it written, check every row.

Shape legend: N rows, C classes.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray import schema, storage
from llkd_ray.artifacts import Rows, write_text
from llkd_ray.config import Experiment, HTTPTeacher, VLLMTeacher
from llkd_ray.errors import ConfigError
from llkd_ray.guided.asking import report_of
from llkd_ray.guided.budget import share_out
from llkd_ray.guided.card import data_card
from llkd_ray.guided.evaluation import render
from llkd_ray.guided.prompt import writing_prompt
from llkd_ray.guided.seed import TRAIN, VALIDATION, Seed, examples_of, read_seed
from llkd_ray.guided.shown import draw, sort_rows
from llkd_ray.guided.sift import SAMPLES, Sources, sift
from llkd_ray.guided.write import Round, write
from llkd_ray.teacher.actor import Opening
from llkd_ray.teacher.wording import label_words

PROMPTS, REPORT = "prompts.parquet", "report.json"
_PARTS = "parts"


def write_lessons(
    sources: Sources, experiment: Experiment, number: int, folder: Path
) -> tuple[Rows, dict[str, Any]]:
    """Make one round's rows. Needs a connection to Ray; what is written already is not again.

    Reads:
        Every folder of `sources`.

    Writes:
        folder/report.json (the validation report), prompts.parquet (schema.PROMPTS),
        samples.parquet (schema.lessons), unlabeled/shard-*.parquet (schema.labels, the rows kept,
        which any training can take), README.md (the data card).

    Returns:
        The count, and details: `dropped` by reason, and tokens: written, of prompts and of
        read-outs, and of both those found in the cache.

    Raises:
        TeacherError: The teacher cannot write, or most of what it was asked for came to nothing.
    """
    task, guide = experiment.task, experiment.guide
    opening = opening_of(experiment, read_seed(sources.seed, [TRAIN], task.label_names))
    of = Round(number, experiment.seed)
    storage.here(folder)
    if not (folder / PROMPTS).is_file():
        _write_prompts(sources, experiment, opening, of, folder)
    if (folder / SAMPLES).is_file() and not (folder / _PARTS).is_dir():
        # A kill at the very end: what was written is there as it was checked.
        columns = schema.written(len(task.labels)).names
        written = pq.read_table(folder / SAMPLES, columns=columns)
    else:
        written = write(
            pq.read_table(folder / PROMPTS),
            folder / _PARTS,
            opening=opening,
            sampling=guide.sampling,
            of=of,
        )
    reasons = sift(written, sources, experiment, folder)
    dropped = Counter(reason for reason in reasons if reason is not None)
    kept = len(reasons) - dropped.total()
    details = {
        "number": number,
        "dropped": dict(dropped.most_common()),
        **{
            name: pc.sum(written.column(name)).as_py()
            for name in (
                *("tokens", "prompt_tokens", "cached_tokens"),
                *("readout_tokens", "readout_cached_tokens"),
            )
        },
    }
    card = data_card(experiment, number, written=len(reasons), kept=kept, dropped=dropped)
    write_text(folder / "README.md", card)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return Rows(taken=len(reasons), kept=kept, rejected=dropped.total()), details


def author_of(experiment: Experiment) -> VLLMTeacher | HTTPTeacher:
    """Return the teacher, if it can write.

    Raises:
        ConfigError: It is no language model.
    """
    teacher = experiment.teacher
    if not isinstance(teacher, VLLMTeacher | HTTPTeacher):
        raise ConfigError(
            f"teacher.kind = {teacher.kind!r}: only a language model writes rows; set "
            "teacher.kind = 'vllm' or 'http' for jobs/guide.py"
        )
    return teacher


def opening_of(experiment: Experiment, seed: Seed) -> Opening:
    """Return the teacher as it reads: of gold rows it may be shown those of the seed alone."""
    teacher, task = author_of(experiment), experiment.task
    pool = () if teacher.shots.kind == "fixed" else examples_of(seed, task.label_names)
    return Opening(task, teacher, pool, experiment.cache)


def _write_prompts(
    sources: Sources, experiment: Experiment, opening: Opening, of: Round, folder: Path
) -> None:
    """See what the student gets wrong, and write the round's prompts for it."""
    task, guide = experiment.task, experiment.guide
    report, _ = report_of(sources.student, sources.seed, experiment)
    _, rows = report_of(sources.student, sources.seed, experiment, (TRAIN, VALIDATION))
    write_text(folder / REPORT, json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    count, room = _measure(opening, guide.sampling.max_tokens)
    words = dict(zip(task.label_names, label_words(task), strict=True))
    told = render(report, words, tokens=guide.report_tokens, count=count)
    # A small seed may have no validation row of a label: nothing is known of its weakness.
    f1 = np.array([of.f1 if of.rows else report.f1 for of in report.classes])
    prompts = []
    sorted_rows = sort_rows(rows, guide.shown)
    for at, budget in enumerate(share_out(guide.samples, f1, guide.weakness).tolist()):
        for first in range(0, budget, guide.samples_per_prompt):
            shown = draw(rows, sorted_rows[at], guide.shown, (of.seed, of.number, at, first))
            text = writing_prompt(
                task,
                task.labels[at],
                told,
                shown,
                chat=_is_chat(opening.teacher),
                form=guide.sampling.form,
                room=room,
                count=count,
            )
            prompts.append(
                {
                    "prompt_id": of.sample_id(at, first),
                    "label": task.label_names[at],
                    "first": first,
                    "samples": min(guide.samples_per_prompt, budget - first),
                    "text": text,
                }
            )
    beside = folder / f".{PROMPTS}"
    pq.write_table(pa.Table.from_pylist(prompts, schema.PROMPTS), beside)
    beside.replace(folder / PROMPTS)
    storage.put(folder)


def _measure(opening: Opening, max_tokens: int) -> tuple[Callable[[str], int], int]:
    """Return how the tokens of a text are counted, and how many of them a prompt may have.

    Of an endpoint no tokenizer is known: words are counted, and what is too long it says itself.
    """
    prompt = opening.prompt()
    if prompt is None or not isinstance(opening.teacher, VLLMTeacher):
        return (lambda text: len(text.split())), sys.maxsize
    around = len(prompt.to_write(""))
    room = opening.teacher.engine.max_model_len - max_tokens - around
    return (lambda text: len(prompt.to_write(text)) - around), room


def _is_chat(teacher: object) -> bool:
    """Return whether a teacher answers a turn, or goes on from a text."""
    if isinstance(teacher, HTTPTeacher):
        return teacher.api == "chat"
    return isinstance(teacher, VLLMTeacher) and teacher.prompt.format == "chat"
