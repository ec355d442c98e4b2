"""Which settings decide which artifacts: every setting there is, changed one at a time."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from llkd_ray.config import Experiment, load_experiment, with_overrides
from llkd_ray.lineage import Lineage

QUICKSTART = Path(__file__).parents[1] / "jobs/configs/quickstart.toml"
BASE = ('teacher.splits=["unlabeled","validation","test"]',)
STACKED = ("calibration.kind=stacked", 'bench.targets=["teacher","student","cascade"]')
HTTP = ("teacher.kind=http", "teacher.url=http://localhost:1/v1", "teacher.model=some")

NOTHING = {
    *("cache", "ray.address", "ray.num_cpus", "ray.object_store_mb"),
    *(f"teacher.actors.{key}" for key in ("min", "max", "num_cpus", "num_gpus")),
    *("teacher.actors.batches_in_flight", "teacher.batch_size"),
    *("teacher.usd_per_actor_hour", "teacher.tokens_per_s"),
    *("train.cpus_per_worker", "train.threads_per_worker"),
    *("train.max_failures", "train.checkpoint_steps"),
}
"""What says where, how fast or for how much something is made, and nothing about what it is."""
ONLY_WITH_A_POOL = {"task.max_examples"}
OF_ENDPOINTS = {
    *("api_key_env", "max_concurrency", "requests_per_minute", "timeout_s", "max_retries"),
    *("usd_per_million_input_tokens", "usd_per_million_output_tokens"),
}

OTHERS = {
    "task.labels": '[{ name = "a" }, { name = "b" }]',
    "task.examples": "[]",
    "task.examples_source": "trec",
    "teacher.kind": "scripted",
    "teacher.url": "http://localhost:2/v1",
    "teacher.splits": '["unlabeled", "validation"]',
    "selection.rule": "joint",
    "selection.kept": "[5]",
    "student.kind": "static",
    "train.deepspeed": str(QUICKSTART),
    "train.stopping.choose_by": "last",
    "evaluate.compare_rules": '["all"]',
    "compare.variants": '{ other = ["train.epochs=1"] }',
    "guide.rule": "joint",
    "guide.checks.length": "[0.4, 1.6]",
    "serve.backend": "torch",
    "bench.targets": '["teacher", "student"]',
    "bench.others": '[{ name = "other", url = "http://localhost:1", protocol = "tei" }]',
    "bench.rates_per_s": "[1.0]",
}
"""Other values of settings for which none can be made up from the value there is."""
ELSEWHERE = ("name", "runs", "corpus.source")
"""Not changed here: what names the run, and the files, which go by their content."""
NEEDS = {
    "teacher.actors.min": ("teacher.actors.max=2",),
    "task.labels": ("task.examples=[]",),
    "train.offload": ("train.zero_stage=1",),
}


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, annotation and value of every setting."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field.annotation, value


def choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for inner in get_args(annotation) for choice in choices(inner)]


def another(annotation: Any, value: Any) -> Any:
    """Make up another value of a setting."""
    if isinstance(value, bool):
        return not value
    others = [choice for choice in choices(annotation) if choice != value]
    if others and not isinstance(value, tuple):
        return others[0]
    match value:
        case int():
            return value + 1
        case float():
            return value * 0.9 or 0.1
        case str():
            return f"{value}x"
        case tuple():
            return list(value[:1])
        case _:
            return "x" if "str" in str(annotation) else 0.5 if "float" in str(annotation) else 1


@cache
def nouns_of(*kinds: str, section: str = "") -> dict[str, set[str]]:
    """Return the artifacts that each setting decides, by path."""
    experiment = load_experiment(QUICKSTART, (*BASE, *kinds))
    before = made_of(experiment)
    decided = {}
    for path, annotation, value in leaves(experiment):
        if path in ELSEWHERE or not path.startswith(section):
            continue
        other = OTHERS.get(path) or json.dumps(another(annotation, value))
        after = made_of(with_overrides(experiment, [*NEEDS.get(path, ()), f"{path}={other}"]))
        decided[path] = {noun for noun, made in after.items() if made != before.get(noun)}
    return decided


def made_of(experiment: Experiment) -> dict[str, set[Path]]:
    made: dict[str, set[Path]] = {}
    lineage = Lineage(experiment)
    for artifact in lineage.artifacts:
        made.setdefault(artifact.noun, set()).add(artifact.path)
    return {**made, "ledger": {lineage.ledger}}


def test_every_setting_makes_another_artifact_but_those_that_do_not_touch_the_content() -> None:
    decided = nouns_of(*STACKED)
    assert {path for path, nouns in decided.items() if not nouns} == NOTHING | ONLY_WITH_A_POOL


def test_of_an_endpoint_neither_key_nor_pace_nor_price_ask_it_anew() -> None:
    decided = nouns_of(*HTTP, section="teacher.")
    indifferent = {path for path, nouns in decided.items() if not nouns}
    assert {path for path in indifferent if "actors" not in path} == {
        "teacher.batch_size",
        *(f"teacher.{key}" for key in OF_ENDPOINTS),
    }
    for key in ("url", "model", "api", "votes", "vote_temperature", "top_logprobs"):
        assert "ledger" in decided[f"teacher.{key}"], key


@pytest.mark.parametrize("rule", ["freematch", "confident-learning", "random", "fixed", "joint"])
def test_every_setting_of_a_rule_makes_another_student(rule: str) -> None:
    decided = nouns_of(f"selection.rule={rule}", section="selection.")
    del decided["selection.rule"]
    assert {path for path, nouns in decided.items() if "student" not in nouns} == set()


def test_an_encoder_that_is_trained_further_chooses_other_examples(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    weights = tmp_path / "encoder/model.safetensors"
    ledgers = set()
    for held in ("first", "second"):
        weights.write_text(held)
        for kind in ("nearest", "fixed"):
            shots = (f"teacher.shots.kind={kind}", f"teacher.shots.encoder={weights.parent}")
            settings = (*shots, f"cache={tmp_path}", "task.examples_source=trec")
            ledgers.add((kind, Lineage(load_experiment(QUICKSTART, settings)).ledger))
    assert sorted(kind for kind, _ in ledgers) == ["fixed", "nearest", "nearest"]


def test_what_only_later_stages_read_asks_the_teacher_nothing() -> None:
    asks = {path.split(".")[0] for path, nouns in nouns_of(*STACKED).items() if "ledger" in nouns}
    assert asks == {"task", "teacher"}


def test_what_only_the_endpoint_reads_trains_nothing() -> None:
    decided = nouns_of(*STACKED)
    for path, nouns in decided.items():
        # The rules that it names are students of their own.
        if path == "evaluate.compare_rules":
            continue
        if path.split(".")[0] in ("serve", "bench", "cascade", "export", "evaluate"):
            assert not nouns & {"corpus", "readouts", "labels", "student", "round"}, path
