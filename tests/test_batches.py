"""Rows of a worker, their batches, and the order of an epoch."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_data import NAMES

from llkd_ray.student import batches
from llkd_ray.student.model import load_tokenizer, locate
from llkd_ray.student.order import lanes_for, plan_epoch

WHOLE = batches.Share(0, 1, 8)


def rows_of(work, share):
    tokenizer = load_tokenizer(locate(work.student.model))
    return batches.read_rows(work.labels, tokenizer, 64, NAMES, share=share)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_row_belongs_to_one_worker(work, workers):
    keys = Counter()
    for rank in range(workers):
        keys.update(rows_of(work, batches.Share(rank, workers, 8)).keys.tolist())
    assert len(keys) == 120
    assert set(keys.values()) == {1}


def test_rows_carry_what_the_shards_say(work):
    rows = rows_of(work, WHOLE)
    tokenizer = load_tokenizer(locate(work.student.model))
    shards = [pq.read_table(path).to_pylist() for path in sorted(work.labels.iterdir())]
    for i, row in enumerate(row for shard in shards for row in shard):
        assert NAMES[rows.label[i]] == row["label"]
        assert NAMES[rows.gold[i]] == row["gold"]
        assert rows.teacher[i].tolist() == row["probabilities"]
        assert f"{rows.keys[i]:016x}{rows.lower[i]:016x}" == row["row_id"]
        ids = rows.tokens[i]
        assert ids.tolist() == tokenizer(row["text"], truncation=True, max_length=64)["input_ids"]


def test_a_batch_is_padded_to_its_longest_text(work):
    rows = rows_of(work, WHOLE)
    chosen = np.array([4, 0, 9])
    inputs = batches.pad(rows.tokens, chosen, 0, torch.device("cpu"))
    lengths = rows.tokens.lengths[chosen]
    assert inputs["input_ids"].shape == (3, lengths.max())
    assert inputs["attention_mask"].sum(dim=1).tolist() == lengths.tolist()
    nothing = batches.pad(rows.tokens, np.array([], dtype=np.int64), 0, torch.device("cpu"))
    assert nothing["input_ids"].shape == (1, 1)


def test_scoring_goes_from_long_to_short_and_pads_with_empty_batches():
    parts = list(batches.by_length(np.array([3, 9, 5, 7, 1]), 2, 4))
    assert [part.tolist() for part in parts] == [[1, 3], [2, 0], [4], []]


def test_a_subset_has_the_same_texts(work):
    rows = rows_of(work, WHOLE)
    chosen = rows.keys % np.uint64(3) == 1
    subset = rows.subset(chosen)
    for at, position in enumerate(np.flatnonzero(chosen)):
        assert subset.keys[at] == rows.keys[position]
        ours = batches.pad(subset.tokens, np.array([at]), 0, torch.device("cpu"))
        theirs = batches.pad(rows.tokens, np.array([position]), 0, torch.device("cpu"))
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def drawn(rows, seed=0):
    random = np.random.default_rng(seed)
    halves = random.integers(0, 2**63, (2, rows)).astype(np.uint64)
    return halves[0], halves[1], random.integers(3, 60, rows)


def planned(keys, lower, lengths, steps, *, batch_size=32, epoch=1):
    return plan_epoch(
        keys, lower, lengths, lanes=lanes_for(batch_size), num_steps=steps, seed=1, epoch=epoch
    )


def test_an_epochs_plan_deals_out_each_row_once_and_evenly():
    rows = drawn(1003)
    plan = planned(*rows, 31)
    assert sorted(np.concatenate(plan).tolist()) == list(range(1003))
    assert all(28 <= len(step) <= 37 for step in plan)
    again, later = planned(*rows, 31), planned(*rows, 31, epoch=2)
    assert [step.tolist() for step in plan] == [step.tolist() for step in again]
    assert {frozenset(step.tolist()) for step in plan}.isdisjoint(
        {frozenset(step.tolist()) for step in later}
    )


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 1003])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_workers(workers, count):
    keys, lower, lengths = drawn(count)
    steps = -(-count // 32)
    whole = planned(keys, lower, lengths, steps)
    parts = []
    for rank in range(workers):
        mine = np.flatnonzero(batches.Share(rank, workers, lanes_for(32)).of(lower))
        parts.append([mine[at] for at in planned(keys[mine], lower[mine], lengths[mine], steps)])
    for step, expected in enumerate(whole):
        together = np.concatenate([part[step] for part in parts])
        assert sorted(together.tolist()) == sorted(expected.tolist())


def test_the_order_in_which_rows_were_read_does_not_matter():
    keys, lower, lengths = drawn(200)
    other = np.random.default_rng(5).permutation(200)
    plan = planned(keys, lower, lengths, 7)
    turned = planned(keys[other], lower[other], lengths[other], 7)
    for one, two in zip(plan, turned, strict=True):
        assert set(keys[one].tolist()) == set(keys[other[two]].tolist())


def test_workers_take_even_shares_of_like_length_in_the_same_steps():
    keys, lower, lengths = drawn(1003)
    longest = []
    for rank in range(2):
        mine = np.flatnonzero(batches.Share(rank, 2, 8).of(lower))
        plan = planned(keys[mine], lower[mine], lengths[mine], 31)
        assert all(12 <= len(step) <= 20 for step in plan)
        longest.append([lengths[mine][step].max() for step in plan])
    assert np.corrcoef(*longest)[0, 1] > 0.8


def test_little_is_padded():
    keys, lower, lengths = drawn(4000)
    plan = planned(keys, lower, lengths, 125)
    padded = sum(lengths[step].max() * len(step) for step in plan)
    assert padded < 1.25 * lengths.sum()
