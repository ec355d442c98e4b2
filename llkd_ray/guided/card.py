"""The data card of a round's rows."""

from collections import Counter

from llkd_ray.config import Experiment


def data_card(
    experiment: Experiment, number: int, *, written: int, kept: int, dropped: Counter[str]
) -> str:
    """Return README.md of a lessons artifact."""
    guide = experiment.guide
    reasons = "\n".join(f"| {reason} | {rows} |" for reason, rows in dropped.most_common())
    labels = "\n".join(f"- {name}" for name in experiment.task.label_names)
    return f"""---
task_categories:
- text-classification
tags:
- synthetic
configs:
- config_name: default
  data_files: unlabeled/shard-*.parquet
---

# {experiment.name}: rows written by a language model, round {number}

{kept} of {written} texts that `{experiment.teacher.model}` wrote about what a student got wrong
(PGKD, arXiv 2411.05045). No person wrote or read them: the label is what the model was asked to
write about, and some are wrong. They are to train on, never to measure with.

Labels:

{labels}

| dropped because | rows |
|---|---:|
{reasons}
| **kept** | {kept} |

- `unlabeled/shard-*.parquet`: the rows kept, as `jobs/label.py` leaves them.
- `samples.parquet`: every text with its prompt, seed, label asked for, label that the model reads
  in it, and why it was dropped.
- `prompts.parquet`: every prompt. Prompts show gold rows of the seed ({guide.seed_rows} rows, the
  validation rows among them).
- `report.json`: the student on the seed's validation rows, as it was before this round.

Sampling: temperature {guide.sampling.temperature}, top-p {guide.sampling.top_p}, at most
{guide.sampling.max_tokens} tokens. `manifest.json` names settings, inputs, versions and commit.
"""
