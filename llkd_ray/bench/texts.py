"""The texts that endpoints are measured with."""

from pathlib import Path

import pyarrow.parquet as pq

from llkd_ray.corpus import read_shards

_MOST = 20_000
"""More than any bench sends: there is no need to read them all."""


def read_texts(corpus: Path, max_chars: int) -> dict[str, str | None]:
    """Return texts with their gold: the test split's first, then unlabeled ones without.

    The student was trained on the unlabeled split, so its gold would say nothing here.

    Reads:
        corpus/SPLIT/shard-*.parquet (schema.TEXT).

    Args:
        corpus: Folder of the corpus artifact.
        max_chars: Longer texts are left out: an endpoint would refuse them.
    """
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
            if len(texts) > _MOST:
                return texts
    return texts
