import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART

from llkd_ray import corpus
from llkd_ray.config import (
    CorpusSection,
    Experiment,
    HTTPTeacher,
    Label,
    ScriptedTeacher,
    TaskSection,
    VLLMTeacher,
    load_experiment,
)
from llkd_ray.teacher.actor import Opening
from llkd_ray.teacher.plan import Measured, Plan, describe, histogram, plan

BLOCK = 32


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment(
        QUICKSTART, ["teacher.max_unlabeled_rows=300", "teacher.splits=['unlabeled']"]
    )


@pytest.fixture(scope="module")
def texts(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus.prepare(experiment.corpus, experiment.task, folder)
    return folder


def opening(experiment: Experiment, **teacher: Any) -> Opening:
    """The experiment's teacher with some settings changed."""
    settings = experiment.teacher.model_dump() | teacher
    return Opening(experiment.task, VLLMTeacher.model_validate(settings), (), experiment.cache)


def first_texts(folder: Path, rows: int) -> list[str]:
    shards = corpus.read_shards(folder / "unlabeled")
    return [text for shard in shards for text in pq.read_table(shard)["text"].to_pylist()][:rows]


def passes(asked: Opening, texts: list[str]) -> list[list[list[int]]]:
    """The token ids of each pass of each text."""
    prompt = asked.prompt()
    assert prompt is not None
    return [
        [prompt.encode([text])[0].ids + list(branch.path) for branch in prompt.readout.branches]
        for text in texts
    ]


def cached(rows: list[list[list[int]]]) -> list[int]:
    """Tokens of each row that a cache of whole blocks gives, rows being asked one by one."""
    blocks: set[tuple[int, ...]] = set()
    found = []
    for row in rows:
        hits = 0
        for ids in row:
            ends = range(BLOCK, len(ids), BLOCK)
            hits += BLOCK * sum(tuple(ids[:end]) in blocks for end in ends)
            blocks.update(tuple(ids[:end]) for end in [*ends, len(ids)] if end % BLOCK == 0)
        found.append(hits)
    return found


def said(drawn: str, pattern: str) -> list[float]:
    found = re.search(pattern, drawn)
    assert found, drawn
    return [float(number.replace(",", "")) for number in found.groups()]


def test_tokens_and_cache_are_those_of_asking_row_by_row(
    experiment: Experiment, texts: Path
) -> None:
    asked = opening(experiment)
    planned = plan(texts, asked)
    rows = passes(asked, first_texts(texts, 300))
    sample = planned.sample
    assert [row.tokens for row in sample.asked] == [sum(map(len, row)) for row in rows]
    assert [row.length for row in sample.asked] == [len(row[0]) for row in rows]
    # The first row finds an empty cache.
    assert [row.cached for row in sample.asked][1:] == cached(rows)[1:]
    assert planned.rows == 300
    assert planned.tokens == pytest.approx(sum(len(row[0]) for row in rows))
    assert planned.cached_tokens == pytest.approx(sum(cached(rows)[1:]) * 300 / 299, rel=0.001)


def test_passes_of_a_row_find_its_own_prompt_in_the_cache(
    experiment: Experiment, texts: Path
) -> None:
    asked = opening(experiment, readout="trie", max_unlabeled_rows=40)
    task = experiment.task.model_copy(
        update={
            "labels": tuple(
                Label(name=label.name, words=f"kind of {label.words or label.name}")
                for label in experiment.task.labels
            )
        }
    )
    asked = Opening(task, asked.teacher, (), asked.cache)
    planned = plan(texts, asked)
    rows = passes(asked, first_texts(texts, 40))
    assert planned.sample.passes == len(rows[0]) > 1
    assert [row.tokens for row in planned.sample.asked] == [sum(map(len, row)) for row in rows]
    expected, found = [row.cached for row in planned.sample.asked][1:], cached(rows)[1:]
    # A pass may find a block more, where the paths of two of them go the same way.
    assert all(a <= b for a, b in zip(expected, found, strict=True))
    assert sum(expected) > 0.95 * sum(found)


def test_the_plan_covers_what_the_settings_ask_for(experiment: Experiment, texts: Path) -> None:
    kept = {
        split: sum(pq.read_metadata(path).num_rows for path in corpus.read_shards(texts / split))
        for split in corpus.SPLITS
    }
    whole = plan(
        texts, opening(experiment, splits=("unlabeled", "test"), max_unlabeled_rows=None), done=100
    )
    assert whole.rows == kept["unlabeled"] + kept["test"]
    assert whole.left == whole.rows - 100
    assert len(whole.sample.asked) == whole.sample.size == 1000
    every = plan(texts, opening(experiment, splits=corpus.SPLITS, max_unlabeled_rows=7))
    assert every.rows == 7 + kept["validation"] + kept["test"]
    # The sample begins with the unlabeled rows, wherever they stand among the splits.
    last = plan(texts, opening(experiment, splits=("test", "unlabeled"), max_unlabeled_rows=7))
    assert last.sample.prompts == whole.sample.prompts
    first = first_texts(texts, 3)
    assert all(" ".join(t.split()) in p for t, p in zip(first, last.sample.prompts, strict=True))


def test_hours_and_cost_follow_from_the_rate_of_one_actor(
    experiment: Experiment, texts: Path
) -> None:
    actors = {"max": 4, "num_cpus": 3.0}
    measured = Measured(500.0, "measured in labels-1")
    planned = plan(texts, opening(experiment, actors=actors, usd_per_actor_hour=2.0), 0, measured)
    hours = (planned.tokens - planned.cached_tokens) / 500 / 3600
    assert planned.actor_hours == pytest.approx(hours)
    told = describe(planned)
    assert "rate: 500 uncached tokens/s of one actor, measured in labels-1" in told
    actor_hours, cpu_hours, usd = said(told, r"cost: (\S+) actor-hours, (\S+) CPU-hours, (\S+) USD")
    assert actor_hours == pytest.approx(hours, rel=0.01)
    assert cpu_hours == pytest.approx(3 * hours, rel=0.01)
    assert usd == pytest.approx(2 * hours, rel=0.01)
    (minutes,) = said(told, r"time: (\S+) minutes with 4 actors")
    assert minutes == pytest.approx(hours * 60 / 4, abs=0.1)
    on_gpus = {"num_gpus": 1.0, "max": 1}
    engine = experiment.teacher.model_dump()["engine"] | {"tensor_parallel_size": 2}
    stated = opening(experiment, actors=on_gpus, engine=engine, tokens_per_s=50.0)
    told = describe(plan(texts, stated, 0, measured))
    assert "rate: 50 uncached tokens/s of one actor, as teacher.tokens_per_s states" in told
    assert said(told, r", (\S+) GPU-hours") == [pytest.approx(20 * hours, rel=0.01)]


def test_without_a_rate_the_plan_says_how_to_get_one(experiment: Experiment, texts: Path) -> None:
    planned = plan(texts, opening(experiment))
    assert planned.actor_hours is None
    told = describe(planned)
    assert "teacher.max_unlabeled_rows=1000" in told
    assert "teacher.tokens_per_s" in told
    assert "USD" not in told


def test_cut_and_rejected_rows_are_counted_and_rejected_ones_cost_nothing(
    experiment: Experiment, texts: Path
) -> None:
    whole = plan(texts, opening(experiment))
    for overlong in ("head", "reject"):
        asked = opening(experiment, prompt={"max_text_tokens": 8, "overlong": overlong})
        prompt = asked.prompt()
        assert prompt is not None
        encoded = prompt.encode(first_texts(texts, 300))
        cut = sum(one.cut_tokens > 0 and one.error is None for one in encoded)
        rejected = sum(one.error is not None for one in encoded)
        assert max(cut, rejected) > 20
        planned = plan(texts, asked)
        told = describe(planned)
        assert said(told, r"(\d+) are cut to fit and (\d+) kept aside") == [cut, rejected]
        assert planned.tokens == pytest.approx(sum(len(one.ids) for one in encoded))
        assert planned.tokens < whole.tokens


def test_an_endpoint_is_planned_in_words_and_prices(experiment: Experiment, texts: Path) -> None:
    teacher = HTTPTeacher(
        url="http://localhost:1/v1",
        model="any",
        max_unlabeled_rows=50,
        requests_per_minute=60,
        usd_per_million_input_tokens=3.0,
        usd_per_million_output_tokens=15.0,
    )
    planned = plan(texts, Opening(experiment.task, teacher, (), experiment.cache))
    told = describe(planned)
    assert "taken for 4/3 of its words" in told
    words = [len(prompt.split()) for prompt in planned.sample.prompts]
    assert [row.length for row in planned.sample.asked[:3]] == [round(n * 4 / 3) for n in words]
    (usd,) = said(told, r"cost: (\S+) USD, at 3 and 15 USD a million tokens")
    assert usd == pytest.approx((planned.tokens * 3 + planned.rows * 15) / 1e6, rel=0.01)
    (minutes,) = said(told, r"time: (\S+) minutes with 1 actor at least")
    assert minutes == pytest.approx(planned.rows / 60, abs=0.1)
    assert "\nA: acronym\n" not in planned.sample.prompts[0]
    lettered = teacher.model_copy(update={"readout": "letters"})
    shown = plan(texts, Opening(experiment.task, lettered, (), experiment.cache)).sample.prompts[0]
    assert "\nA: acronym\nB: explanation\n" in shown
    assert "The answer is a: C\n" in shown
    voted = teacher.model_copy(update={"top_logprobs": 0, "votes": 5})
    told = describe(plan(texts, Opening(experiment.task, voted, (), experiment.cache)))
    assert f"at least {5 * planned.rows:,} answered" in told


def test_a_simulation_is_called_one(experiment: Experiment, texts: Path) -> None:
    teacher = ScriptedTeacher(max_unlabeled_rows=50, rows_per_s=10.0)
    planned = plan(texts, Opening(experiment.task, teacher, (), experiment.cache), done=9)
    told = describe(planned)
    assert "a simulation: no model is asked, and the labels mean nothing" in told
    assert f"rows to label: {planned.rows - 9} ({planned.rows}, less 9 asked about already)" in told
    (minutes,) = said(told, r"time: (\S+) minutes with 1 actor")
    assert minutes == pytest.approx(planned.left / 10 / 60, abs=0.1)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 9], list(range(100)), [1, 1000], [3, 7] * 50])
def test_each_length_stands_in_one_bar(lengths: list[int]) -> None:
    bars = [
        (*map(int, (bar[1].replace(",", ""), bar[2].replace(",", ""))), len(bar[3]), int(bar[4]))
        for line in histogram(lengths)
        if (bar := re.fullmatch(r" +([\d,]+) - +([\d,]+) (#*) +(\d+)", line))
    ]
    assert len(bars) == len(histogram(lengths)) <= 10
    for low, high, bar, count in bars:
        assert count == sum(low <= length <= high for length in lengths)
        assert (bar > 0) == (count > 0)
    assert sum(count for *_, count in bars) == len(lengths)
    assert max(bar for _, _, bar, _ in bars) == 40
    assert histogram([]) == []


def test_what_a_text_holds_cannot_steer_the_terminal(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "a \\u001b[2J\\u202e b \\u0000 ' + "long " * 2000 + '"}')
    task = TaskSection(labels=(Label(name="a"), Label(name="b")))
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus.prepare(CorpusSection(source=str(source)), task, folder)
    planned: Plan = plan(folder, Opening(task, HTTPTeacher(url="http://h", model="m"), (), ""))
    told = describe(planned)
    assert "\\x1b[2J\\u202e b \\x00" in told
    assert all(char.isprintable() or char == "\n" for char in told)
    (left_out,) = said(told, r"\[\.\.\. (\S+) characters \.\.\.\]")
    assert len(planned.sample.prompts[0]) == 2400 + left_out
