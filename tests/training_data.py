"""A labels and a corpus artifact's content without a teacher: TREC with wrong labels put in."""

import hashlib
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.embedded import CORPORA, locate

NAMES = ("abbreviation", "description", "thing", "person", "place", "number")
_GOLD = dict(zip(("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"), NAMES, strict=True))


def questions():
    """All distinct (row_id, text, gold), in the order of their row ids."""
    lines = locate(CORPORA["trec"]).read_text(encoding="latin-1").splitlines()
    found = {}
    for line in lines:
        kind, _, text = line.partition(" ")
        if text:
            found[text] = _GOLD[kind.partition(":")[0]]
    rows = [(hashlib.sha256(t.encode()).hexdigest()[:32], t, gold) for t, gold in found.items()]
    return sorted(rows)


def labelled(rows, seed, wrong=0.35):
    """Rows of schema.labels: a share has a wrong label, with less confidence on average."""
    rng = np.random.default_rng(seed)
    classes, out = len(NAMES), []
    for row_id, text, gold in rows:
        right = rng.random() > wrong
        answer = NAMES.index(gold)
        if not right:
            answer = (answer + int(rng.integers(1, classes))) % classes
        confidence = 0.3 + 0.69 * (rng.beta(4, 2) if right else rng.beta(2, 3))
        rest = rng.dirichlet(np.ones(classes - 1)) * (1 - confidence)
        rest = np.minimum(rest, confidence * 0.99)
        p = np.insert(rest, answer, confidence)
        p = (p / p.sum()).astype(np.float32)
        out.append(
            {
                "row_id": row_id,
                "text": text,
                "gold": gold,
                "label": NAMES[int(p.argmax())],
                "confidence": float(p.max()),
                "probabilities": p.tolist(),
                "logprobs": np.log(p * 0.8 + 1e-6).tolist(),
                "label_mass": 0.8,
            }
        )
    return out


def write(folder, rows, columns, shard_rows=500):
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(rows), shard_rows)):
        part = rows[start : start + shard_rows]
        part = [{name: row.get(name) for name in columns.names} for row in part]
        pq.write_table(pa.Table.from_pylist(part, columns), folder / f"shard-{number:05d}.parquet")


def make_split_folders(folder, unlabeled, validation, test=0, *, seed=0, gold=True):
    """Write labels/ and corpus/ under a folder and return the two paths."""
    rows = questions()
    ends = np.cumsum([0, unlabeled, validation, test])
    parts = [rows[a:b] for a, b in itertools.pairwise(ends)]
    unlabeled, validation, test = (labelled(part, seed + i) for i, part in enumerate(parts))
    if not gold:
        for row in (*unlabeled, *validation, *test):
            row["gold"] = None
    labels, corpus = folder / "labels", folder / "corpus"
    columns = schema.labels(len(NAMES))
    write(labels / "unlabeled", unlabeled, columns, shard_rows=max(1, len(unlabeled) // 3))
    write(labels / "validation", validation, columns)
    write(labels / "test", test, columns)
    write(corpus / "unlabeled", unlabeled, schema.TEXT)
    write(corpus / "validation", validation, schema.TEXT)
    write(corpus / "test", test, schema.TEXT)
    return labels, corpus
