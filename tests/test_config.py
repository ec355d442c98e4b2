import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICKSTART, ROOT, run_job

from llkd_ray.config import (
    AllRule,
    LLKDRule,
    as_tree,
    load_experiment,
    rule_named,
    with_overrides,
)
from llkd_ray.errors import ConfigError


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/configs/**/*.toml")), ids=lambda p: p.name)
def test_every_shipped_experiment_loads(path: Path) -> None:
    assert load_experiment(path).task.labels


def test_an_override_replaces_a_key_and_leaves_the_rest() -> None:
    plain = load_experiment(QUICKSTART)
    changed = load_experiment(QUICKSTART, ["train.epochs=7", "name=trial"])
    assert (changed.train.epochs, changed.name) == (7, "trial")
    assert changed.train.model_copy(update={"epochs": plain.train.epochs}) == plain.train


def test_naming_another_rule_drops_the_settings_of_the_first() -> None:
    overrides = ["selection.rule=llkd", "selection.student_decay=0.5", "selection.rule=all"]
    assert load_experiment(QUICKSTART, overrides).selection == AllRule()


def test_the_experiments_own_rule_keeps_its_settings() -> None:
    own = LLKDRule(student_decay=0.5)
    assert rule_named("llkd", own) is own
    assert rule_named("all", own) == AllRule()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean train.epochs?"),
        ("tran.epochs=3", "tran: unknown key; did you mean train?"),
        ("teacher.engine.dtyp=float32", "did you mean teacher.engine.dtype?"),
        ("selection.teacher_decya=0.1", "did you mean selection.teacher_decay?"),
        ("selection.rule=llkdd", "selection"),
        ("train.epochs=0", "train.epochs = 0: input should be greater than 0"),
        ('bench.targets=["student"]', "targets must have teacher and student"),
        ('bench.others=[{name="student",url="http://x"}]', "'student' names two endpoints"),
        ("train.epochs=many", "train.epochs = 'many'"),
        ("teacher.actors.min=3", "teacher.actors: min = 3 is above max = 1"),
        ("train.epochs", "write section.key=value"),
        ("name.first=a", "name is not a section"),
        ("evaluate.compare_rules=[all]", "'[all]': a list belongs here; in a shell put quotes"),
        ("selection=joint", "this is a section; did you mean selection.rule=joint?"),
        ('task.labels=["a", "b"]', "a table belongs here, for instance { name ="),
        ("name=../elsewhere", "name = '../elsewhere'"),
    ],
)
def test_a_wrong_override_is_told_with_its_dotted_path(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(QUICKSTART, [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text('name = "x"\n')
    with pytest.raises(ConfigError, match="task: this key must be set"):
        load_experiment(tmp_path / "e.toml")


def test_labels_must_be_told_apart_and_examples_must_use_them(tmp_path: Path) -> None:
    start = 'name = "x"\ncorpus = { source = "trec" }\n[task]\n'
    path = tmp_path / "e.toml"
    path.write_text(start + 'labels = [{ name = "a" }, { name = "a" }]\n')
    with pytest.raises(ConfigError, match="'a' stands twice"):
        load_experiment(path)
    path.write_text(
        start
        + 'labels = [{ name = "a" }, { name = "b" }]\nexamples = [{ text = "t", label = "c" }]\n'
    )
    with pytest.raises(ConfigError, match="'c', which is not among"):
        load_experiment(path)


@pytest.mark.parametrize("content", [None, b"name = ", b"\xff\xfe"])
def test_a_file_that_is_no_experiment_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "e.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"e\.toml"):
        load_experiment(path)


def test_the_tree_survives_printing_and_reading() -> None:
    experiment = load_experiment(QUICKSTART)
    assert type(experiment).model_validate(as_tree(experiment)) == experiment


@pytest.mark.parametrize("verb", ["prepare", "label", "train", "evaluate", "serve", "bench", "run"])
def test_a_typo_is_one_line_and_exit_1_before_any_heavy_import(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = run_job(verb, str(QUICKSTART), "train.epoch=3")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    assert "llkd_ray.config" in imported
    assert imported.isdisjoint({"ray", "torch", "transformers", "vllm", "deepspeed", "pyarrow"})
    assert [line for line in lines if not line.startswith("import time")] == [
        f"error: {QUICKSTART}: train.epoch: unknown key; did you mean train.epochs?"
    ]
    assert done.stdout == ""


def test_reading_an_experiment_imports_nothing_heavy() -> None:
    program = (
        "import sys; from llkd_ray.config import load_experiment; import llkd_ray.cli\n"
        f"load_experiment({str(QUICKSTART)!r})\n"
        "heavy = {'ray', 'torch', 'transformers', 'vllm', 'deepspeed', 'pyarrow', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["prepare", "label", "train", "run"])
def test_dry_run_prints_the_resolved_experiment_and_makes_nothing(
    verb: str, tmp_path: Path
) -> None:
    done = run_job(verb, str(QUICKSTART), f"runs={tmp_path}", "train.epochs=7", "--dry-run")
    assert done.returncode == 0
    assert '"epochs": 7' in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("selection.rule=lkld", "selection.rule = 'lkld': no such rule; did you mean 'llkd'?"),
        ("student.kind=statics", "student.kind = 'statics': no such kind; did you mean 'static'?"),
        ("teacher.kind=zzz", "teacher.kind = 'zzz': no such kind; there are vllm, http, scripted"),
    ],
)
def test_a_kind_that_does_not_exist_names_the_near_miss_or_all(override, told):
    with pytest.raises(ConfigError) as error:
        load_experiment(QUICKSTART, [override])
    assert told in str(error.value)
    assert "input tag" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("bench.student_url=http://user:hush@host:8000", "token_env"),
        ('bench.others=[{name="x", url="http://hush@host"}]', "token_env"),
        ("corpus.source=abfss://c@a.net/x?sig=hush", "a secret among its options"),
        ("bench.concurrency=[1, 4, 4]", "concurrency names a number twice"),
    ],
)
def test_what_would_make_a_wrong_or_telling_report_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load_experiment(QUICKSTART, [override])
    assert "hush" not in str(caught.value)


def test_a_kind_keeps_what_all_kinds_share_and_what_is_said_before_it() -> None:
    quickstart = load_experiment(QUICKSTART)
    overrides = ["teacher.url=http://host/v1", "teacher.model=m", "teacher.kind=http"]
    http = load_experiment(QUICKSTART, ["teacher.batch_size=7", *overrides]).teacher
    assert (http.kind, http.model, http.batch_size) == ("http", "m", 7)
    # A paid endpoint is asked about no more rows than the file says.
    assert http.max_unlabeled_rows == quickstart.teacher.max_unlabeled_rows == 2500
    with pytest.raises(ConfigError, match=r"teacher\.model: this key must be set"):
        load_experiment(QUICKSTART, ["teacher.kind=http", "teacher.url=http://host/v1"])

    cut = load_experiment(QUICKSTART, ["student.layers=3", "student.max_length=64"])
    static = with_overrides(cut, ["student.kind=static"]).student
    assert (static.kind, static.max_length) == ("static", 64)
    with pytest.raises(ConfigError, match=r"student\.layers: unknown key"):
        with_overrides(cut, ["student.layers=2", "student.kind=static"])


def test_a_key_in_an_endpoints_address_is_refused_before_anything_is_written() -> None:
    url = "teacher.url=https://user:hush@host/v1"
    with pytest.raises(ConfigError, match="api_key_env") as caught:
        load_experiment(QUICKSTART, ["teacher.kind=http", url, "teacher.model=m"])
    assert "hush" not in str(caught.value)


def test_a_gold_value_is_one_labels() -> None:
    labels = 'task.labels=[{name="thing", gold=["ENTY"]}, {name="ENTY"}]'
    with pytest.raises(ConfigError, match="'thing' and 'ENTY' both have 'ENTY'"):
        load_experiment(QUICKSTART, [labels, "task.examples=[]"])


def test_an_option_may_stand_among_overrides(tmp_path: Path) -> None:
    done = run_job("train", str(QUICKSTART), "--dry-run", f"runs={tmp_path}", "train.epochs=7")
    assert done.returncode == 0, done.stderr
    assert '"epochs": 7' in done.stdout


def test_a_calibration_on_gold_asks_for_the_rows_that_have_it_before_anything_is_labelled() -> None:
    with pytest.raises(ConfigError, match=r"toml: calibration\.kind = .* validation rows: set "):
        load_experiment(QUICKSTART, ["calibration.kind=stacked"])
    split = 'teacher.splits=["unlabeled", "validation"]'
    asked = load_experiment(QUICKSTART, ["calibration.kind=stacked", split])
    assert asked.calibration.encoder == "minilm-l6"
