"""Real workers, real DeepSpeed, real Ray Train; only the encoder is small in most tests."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from training_data import NAMES, make_split_folders

from llkd_ray import schema
from llkd_ray.config import (
    AllRule,
    EvaluateSection,
    LLKDRule,
    StudentSection,
    TrainSection,
)
from llkd_ray.errors import ArtifactError, StudentError
from llkd_ray.student import batches
from llkd_ray.student.checkpoint import read_progress
from llkd_ray.student.evaluate import predict
from llkd_ray.student.loop import Context, Work, learning_rate, train_worker
from llkd_ray.student.model import check_student, load_tokenizer, locate
from llkd_ray.student.scores import score_models

ROWS = 120
TRAIN = TrainSection(
    num_workers=2, epochs=2, batch_size=16, scoring_batch_size=32, learning_rate=1e-3
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_split_folders(tmp_path_factory.mktemp("data"), ROWS, 40, 60)


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory):
    """A BERT of two thin layers with the embedded student's tokenizer: seconds, not minutes."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = load_tokenizer(locate("minilm-l6"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def work(folders, small_encoder):
    labels, corpus = folders
    return Work(
        labels=labels / "unlabeled",
        validation=corpus / "validation",
        label_names=NAMES,
        selection=LLKDRule(),
        student=StudentSection(model=str(small_encoder), max_length=64, dropout=0.0),
        train=TRAIN,
        seed=3,
    )


def changed(work, **train):
    from dataclasses import replace

    return replace(work, train=work.train.model_copy(update=train))


def run_workers(out, work, world_size, *, restored=None, killed_after=None):
    """Train with real processes and gloo; each epoch's whole checkpoint is left in out/epoch-N."""
    out.mkdir(parents=True, exist_ok=True)
    meeting = out / f"meeting-{time.monotonic_ns()}"
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(
            target=worker_main, args=(rank, world_size, meeting, work, out, restored, killed_after)
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == (-signal.SIGKILL if killed_after else 0)
    return read_progress(out / f"epoch-{killed_after or work.train.epochs}")


def worker_main(rank, world_size, meeting, work, out, restored, killed_after):  # noqa: PLR0917
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.distributed.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=world_size
    )

    def report(row, folder):
        shutil.copytree(folder, out / f"epoch-{row['epoch']}", dirs_exist_ok=True)
        torch.distributed.barrier()
        if row["epoch"] == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    train_worker(Context(rank, world_size, torch.device("cpu"), report, restored), work)


def rows_of(work, share):
    tokenizer = load_tokenizer(locate(work.student.model))
    return batches.read_rows(work.labels, tokenizer, 64, NAMES, share=share)


def used_keys(work, checkpoint, world_size):
    """Ids of the rows that all workers together had trained on by a checkpoint."""
    keys = set()
    for rank in range(world_size):
        used = np.load(checkpoint / f"used-{rank:05d}.npy")
        keys |= set(rows_of(work, batches.Share(rank, world_size)).keys[used].tolist())
    return keys


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key[-2:] != "_s"} for row in rows]


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_row_belongs_to_one_worker(work, workers):
    keys = Counter()
    for rank in range(workers):
        keys.update(rows_of(work, batches.Share(rank, workers)).keys.tolist())
    assert len(keys) == ROWS
    assert set(keys.values()) == {1}


def test_rows_carry_what_the_shards_say(work):
    rows = rows_of(work, batches.Share(0, 1))
    tokenizer = load_tokenizer(locate(work.student.model))
    shards = [pq.read_table(path).to_pylist() for path in sorted(work.labels.iterdir())]
    for i, row in enumerate(row for shard in shards for row in shard):
        assert NAMES[rows.label[i]] == row["label"]
        assert NAMES[rows.gold[i]] == row["gold"]
        assert rows.confidence[i] == row["confidence"]
        ids = rows.tokens.ids[rows.tokens.starts[i] : rows.tokens.starts[i + 1]]
        assert ids.tolist() == tokenizer(row["text"], truncation=True, max_length=64)["input_ids"]


def test_a_batch_is_padded_to_its_longest_text(work):
    rows = rows_of(work, batches.Share(0, 1))
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


def planned(work, share, kept, steps, epoch=1):
    return batches.plan_epoch(rows_of(work, share), kept, steps, seed=1, epoch=epoch)


def test_an_epochs_plan_deals_out_each_kept_row_once_and_evenly(work):
    whole, kept = batches.Share(0, 1), np.arange(3, ROWS)
    plan = planned(work, whole, kept, 11)
    assert sorted(np.concatenate(plan).tolist()) == kept.tolist()
    assert {len(step) for step in plan} == {10, 11}
    again, later = planned(work, whole, kept, 11), planned(work, whole, kept, 11, epoch=2)
    assert [step.tolist() for step in plan] == [step.tolist() for step in again]
    assert {frozenset(step.tolist()) for step in plan}.isdisjoint(
        {frozenset(step.tolist()) for step in later}
    )


def test_a_worker_with_fewer_rows_than_steps_gets_empty_batches(work):
    plan = planned(work, batches.Share(0, 1), np.array([5, 9]), 4)
    assert sorted(len(step) for step in plan) == [0, 0, 1, 1]
    assert planned(work, batches.Share(0, 1), np.array([], dtype=np.int64), 0) == []


def test_workers_take_rows_of_like_length_in_the_same_steps(work):
    longest = []
    for rank in range(2):
        rows = rows_of(work, batches.Share(rank, 2))
        plan = planned(work, batches.Share(rank, 2), np.arange(len(rows)), 8)
        longest.append([rows.tokens.lengths[step].max() for step in plan])
    assert np.corrcoef(*longest)[0, 1] > 0.5


def test_the_learning_rate_rises_then_falls_to_zero():
    section = TrainSection(learning_rate=1.0, warmup_fraction=0.2)
    rates = [learning_rate(section, done) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.slow
def test_two_workers_train_as_one_does_at_every_zero_stage(tmp_path, work):
    # One step holds all kept rows, so that the batches are the same however rows are dealt out.
    work = changed(work, batch_size=1000)
    one = run_workers(tmp_path / "one", changed(work, zero_stage=0), 1)
    assert one.steps == 2
    for stage in (0, 1, 2, 3):
        out = tmp_path / f"two-{stage}"
        two = run_workers(out, changed(work, zero_stage=stage), 2)
        assert two.steps == 2
        for mine, theirs in zip(one.audit, two.audit, strict=True):
            # Padding differs with the batch, and with it the last digits of a float32 score.
            assert {**mine, "label": 0} == pytest.approx({**theirs, "label": 0}, rel=1e-4)
        assert used_keys(work, tmp_path / "one/epoch-1", 1) == used_keys(work, out / "epoch-1", 2)
        assert [row["loss"] for row in one.epochs] == pytest.approx(
            [row["loss"] for row in two.epochs], rel=1e-4
        )


@pytest.mark.slow
def test_a_run_killed_after_an_epoch_goes_on_as_if_unbroken(tmp_path, work):
    from dataclasses import replace

    work = replace(
        changed(work, epochs=3), student=work.student.model_copy(update={"dropout": 0.2})
    )
    unbroken = run_workers(tmp_path / "unbroken", work, 2)
    run_workers(tmp_path / "broken", work, 2, killed_after=1)
    resumed = run_workers(tmp_path / "broken", work, 2, restored=tmp_path / "broken/epoch-1")
    # The same numbers in the same order: not a tolerance, the same bits.
    assert resumed.audit == unbroken.audit
    assert without_seconds(resumed.epochs) == without_seconds(unbroken.epochs)
    assert resumed.selection == unbroken.selection


@pytest.mark.slow
def test_rule_all_keeps_every_row_every_epoch_and_never_scores(tmp_path, work):
    from dataclasses import replace

    progress = run_workers(tmp_path, replace(work, selection=AllRule(), validation=None), 2)
    assert progress.steps == 2 * -(-ROWS // 16)
    assert progress.row_steps == 2 * ROWS
    assert progress.epochs[-1]["distinct_rows"] == ROWS
    assert all(row["scoring_s"] == 0 for row in progress.epochs)
    assert all(row["validation_macro_f1"] is None for row in progress.epochs)
    for row in progress.audit:
        assert row["uncertainty_kept"] is None
        assert row["teacher_threshold"] is None
        assert row["purity_kept"] == row["purity_all"]
    assert progress.epochs[1]["loss"] < progress.epochs[0]["loss"]


@pytest.mark.slow
def test_a_trained_student_is_a_plain_pipeline(tmp_path, folders, ray_local):  # noqa: ARG001
    from transformers import pipeline

    from llkd_ray.student.train import train

    labels, corpus = folders
    trained = train(
        labels,
        tmp_path,
        corpus=corpus,
        label_names=NAMES,
        selection=LLKDRule(),
        student=StudentSection(),
        section=TRAIN.model_copy(update={"learning_rate": 5e-5}),
        seed=0,
    )
    assert trained.rows.taken == trained.rows.kept == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "audit.parquet",
        "epochs.parquet",
        "model",
    ]
    assert not list((tmp_path / "model").glob("*.bin"))
    audit, epochs = (
        pq.read_table(tmp_path / "audit.parquet"),
        pq.read_table(tmp_path / "epochs.parquet"),
    )
    assert audit.schema.equals(schema.AUDIT)
    assert epochs.schema.equals(schema.EPOCHS)
    assert audit.num_rows == 2 * len(NAMES)
    kept = sum(epochs["kept"].to_pylist())
    assert sum(audit["kept"].to_pylist()) == kept
    assert trained.details["rows_used_fraction"] == kept / (2 * ROWS)
    classify = pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    texts = ["Who wrote Hamlet ?", "Where is Ulm ?"]
    answers = classify(texts, top_k=None)
    assert {answer["label"] for answer in answers[0]} == set(NAMES)
    assert "macro-F1" in (tmp_path / "model/README.md").read_text()


def train_small(labels, corpus, out, encoder, **train_settings):
    from llkd_ray.student.train import train

    return train(
        labels,
        out,
        corpus=corpus,
        label_names=NAMES,
        selection=LLKDRule(),
        student=StudentSection(model=str(encoder), max_length=64),
        section=TRAIN.model_copy(update={"epochs": 8, **train_settings}),
        seed=0,
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, folders, small_encoder, ray_local):  # noqa: ARG001
    out = tmp_path_factory.mktemp("unbroken")
    return out, train_small(*folders, out, small_encoder)


def assert_same_run(out, trained, unbroken):
    reference, of_reference = unbroken
    assert pq.read_table(out / "audit.parquet").equals(pq.read_table(reference / "audit.parquet"))
    kept = dict(of_reference.details)
    assert {**trained.details, "seconds": 0} == {**kept, "seconds": 0}
    assert (out / "model/model.safetensors").read_bytes() == (
        reference / "model/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_training_survives_a_worker_that_is_killed(tmp_path, folders, small_encoder, unbroken):
    killed = []

    def kill_one():
        wait_for((tmp_path / "ray_train/epoch-0001/progress.json").exists)
        workers = [
            process
            for process in psutil.Process().children(recursive=True)
            if "RayTrainWorker" in " ".join(process.cmdline())
        ]
        workers[0].kill()
        killed.append(workers[0].pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    trained = train_small(*folders, tmp_path, small_encoder, max_failures=1)
    killer.join()
    assert killed
    assert_same_run(tmp_path, trained, unbroken)


@pytest.mark.slow
def test_training_goes_on_after_the_driver_was_killed(tmp_path, folders, small_encoder, unbroken):
    script = f"""
from pathlib import Path
from llkd_ray.cluster import ray_session
from llkd_ray.config import RaySection
from test_student import train_small
with ray_session(RaySection(num_cpus=2)):
    train_small(Path({str(folders[0])!r}), Path({str(folders[1])!r}), Path({str(tmp_path)!r}),
                Path({str(small_encoder)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as driver:
        wait_for((tmp_path / "ray_train/epoch-0002/progress.json").exists)
        for process in (psutil.Process(driver.pid), *psutil.Process(driver.pid).children(True)):
            process.kill()
    done = max(path.name for path in (tmp_path / "ray_train").glob("epoch-*"))
    assert done < "epoch-0008"
    trained = train_small(*folders, tmp_path, small_encoder)
    assert_same_run(tmp_path, trained, unbroken)


@pytest.mark.slow
def test_models_are_scored_on_the_gold_test_rows(tmp_path, folders, unbroken):
    labels, _ = folders
    scored = score_models(
        labels / "test",
        {"llkd": unbroken[0] / "model"},
        tmp_path,
        label_names=NAMES,
        section=EvaluateSection(bootstrap_resamples=50),
        max_length=64,
        batch_size=8,
        seed=0,
    )
    assert list(scored.models) == ["teacher", "teacher_uncalibrated", "llkd"]
    assert scored.rows.kept == 60
    rows = pq.read_table(tmp_path / "predictions.parquet")
    assert rows.schema.equals(schema.predictions(len(NAMES)))
    for name, score in scored.models.items():
        mine = [row for row in rows.to_pylist() if row["model"] == name]
        right = [row["gold"] == row["predicted"] for row in mine]
        assert score.accuracy.value == pytest.approx(sum(right) / 60)
        assert score.accuracy.low <= score.accuracy.value <= score.accuracy.high
        assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in mine)
    shards = [pq.read_table(path).to_pylist() for path in sorted((labels / "test").iterdir())]
    of_teacher = {row["row_id"]: row["label"] for shard in shards for row in shard}
    mine = [row for row in rows.to_pylist() if row["model"] == "teacher"]
    assert {row["row_id"]: row["predicted"] for row in mine} == of_teacher


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_batch_and_follow_the_classes_asked_for(folders, unbroken):
    split, model = folders[0] / "test", unbroken[0] / "model"
    turned = NAMES[::-1]
    one = list(predict(model, split, NAMES, max_length=64, batch_size=1))
    many = list(predict(model, split, turned, max_length=64, batch_size=32))
    assert [i for ids, _ in one for i in ids] == [i for ids, _ in many for i in ids]
    first, second = (np.concatenate([p for _, p in part]) for part in (one, many))
    np.testing.assert_allclose(first, second[:, ::-1], atol=1e-5)
    with pytest.raises(StudentError, match="tells abbreviation"):
        list(predict(model, split, ("yes", "no"), max_length=64, batch_size=8))


def test_a_test_split_that_cannot_be_scored_says_what_to_do(tmp_path):
    labels, _ = make_split_folders(tmp_path, 3, 3, 5, gold=False)
    settings = {
        "label_names": NAMES,
        "section": EvaluateSection(),
        "max_length": 64,
        "batch_size": 8,
        "seed": 0,
    }
    with pytest.raises(ArtifactError, match="gold_column"):
        score_models(labels / "test", {}, tmp_path, **settings)
    with pytest.raises(ArtifactError, match=r"teacher\.splits"):
        score_models(labels / "nowhere", {}, tmp_path, **settings)


def test_an_encoder_that_cannot_be_loaded_says_what_to_do(tmp_path, small_encoder):
    with pytest.raises(StudentError, match="minilm-l6"):
        check_student(StudentSection(model=str(tmp_path / "nowhere")))
    pickled = tmp_path / "pickled"
    shutil.copytree(small_encoder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(StudentError, match="safetensors"):
        check_student(StudentSection(model=str(pickled)))
    with pytest.raises(StudentError, match="at most 512 tokens"):
        check_student(StudentSection(model=str(small_encoder), max_length=513))
    check_student(StudentSection(model=str(small_encoder)))
