"""Rounds: seed, prompts, early stopping, and a job that is killed while the teacher writes."""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, ROOT, Run, command

from llkd_ray import schema
from llkd_ray.artifacts import MANIFEST, Rows, make
from llkd_ray.config import Label, SamplingSection, load_experiment
from llkd_ray.errors import ArtifactError, ConfigError, TeacherError
from llkd_ray.guided.asking import report_of
from llkd_ray.guided.lessons import author_of, opening_of
from llkd_ray.guided.mixture import lay_out
from llkd_ray.guided.prompt import bare, decoding, text_in, writing_prompt
from llkd_ray.guided.rounds import best_of, is_over, make_lessons, make_seed
from llkd_ray.guided.seed import SHARD, TRAIN, VALIDATION, read_seed, write_labelled
from llkd_ray.guided.shown import Shown
from llkd_ray.guided.write import Round, write
from llkd_ray.lineage import Lineage
from llkd_ray.report.story import tell
from llkd_ray.serving.targets import application_of
from llkd_ray.student import train
from llkd_ray.student.model import load_tokenizer, load_untrained, locate
from llkd_ray.student.temperature import Temperature, set_temperature
from llkd_ray.teacher.actor import Opening

SHOWN = Shown(correct=("What is it ?", "Why ?"), wrong=("Is it he ?",), hard=("Who ?", "He ?"))


def words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def task():
    return load_experiment(QUICKSTART).task


def prompt_of(task, *, room, report="accuracy 0.50", chat=False, form="line", shown=SHOWN):
    label = Label(name="person", words="human being", description="who")
    return writing_prompt(task, label, report, shown, chat=chat, form=form, room=room, count=words)


def test_a_prompt_ends_where_the_next_text_of_its_label_begins(task):
    prompt = prompt_of(task, room=1000)
    assert prompt.endswith('"human being" (who), each in one line.\nQuestion:')
    assert prompt.startswith(task.instruction.strip() + "\n\naccuracy 0.50\n\n")
    order = [prompt.index(f"Question: {text}\n") for text in ("Why ?", "Is it he ?", "Who ?")]
    assert order == sorted(order)


def test_a_chat_ends_with_what_is_asked_for(task):
    prompt = prompt_of(task, room=1000, chat=True)
    asked = (
        'Write one more text of the kind "human being" (who), in one line and with nothing else.'
    )
    assert prompt.endswith(f"Question: He ?\n\n{asked}")
    rest = prompt_of(task, room=1000).partition("Here are more")[0]
    assert prompt.removesuffix(asked) == rest


def test_where_json_is_asked_for_rows_are_shown_as_json_lines_and_all(task):
    shown = Shown(correct=('Who said "no" ?\nAnd why ?',), wrong=(), hard=("هل ؟",))
    prompt = prompt_of(task, room=1000, form="json", shown=shown)
    assert '\n{"text": "Who said \\"no\\" ?\\nAnd why ?"}\n' in prompt
    assert '\n{"text": "هل ؟"}\n' in prompt
    assert prompt.endswith('"human being" (who), each as a JSON object like {"text": "..."}.\n')
    chat = prompt_of(task, room=1000, form="json", chat=True)
    assert chat.endswith('(who), as a JSON object like {"text": "..."} and with nothing else.')


def test_a_text_is_taken_out_of_its_json_and_what_is_none_is_no_text(task):
    def read(said):
        return text_in(said, task, "json")

    assert read('{"text": " Question: \\"no\\"\\nWhy ? "}') == 'Question: "no"\nWhy ?'
    assert read('{"text": "half \\ud83d of it"}') == "half  of it"
    for said in (
        "",
        "Who ?",
        '{"text": "Who',
        '{"texts": "Who ?"}',
        '{"text": 3}',
        '["Who ?"]',
        "3",
    ):
        assert read(said) == ""
    assert text_in('{"text": "Who ?"}', task, "line") == '{"text": "Who ?"}'
    assert text_in("Who \ud800was it ?", task, "line") == "Who was it ?"


def test_a_line_ends_with_the_line_and_json_by_itself():
    line, in_json = (decoding(SamplingSection(form=form, top_p=0.5)) for form in ("line", "json"))
    assert line == {"temperature": 1.0, "top_p": 0.5, "max_tokens": 64, "stop": ["\n"]}
    assert in_json.pop("json_schema")["required"] == ["text"]
    assert in_json == {"temperature": 1.0, "top_p": 0.5, "max_tokens": 64}


@pytest.mark.parametrize(
    "said", ["Who ?", " Who ?\n", "Question: Who ?", '"Who ?"', 'Question: "Who ?"', "“Who ?”"]
)
def test_what_a_teacher_puts_around_a_text_is_not_of_it(task, said):
    assert bare(said, task) == "Who ?"


def test_quotation_marks_within_a_text_are_of_it(task):
    for text in ('Who said " no " ?', '"A" and "B', '"', ""):
        assert bare(text, task) == text


def test_a_prompt_leaves_out_the_rows_that_do_not_fit_the_correct_ones_first(task):
    whole = prompt_of(task, room=1000)
    shorter = prompt_of(task, room=words(whole) - 1)
    assert "What is it ?" not in shorter
    assert "Why ?" in shorter
    least = prompt_of(task, room=words(whole) - 30)
    assert words(least) <= words(whole) - 30
    assert "Why ?" not in least
    with pytest.raises(TeacherError, match=r"'person' takes \d+ of 20 tokens before any row"):
        prompt_of(task, room=20)


def test_rounds_end_when_the_loss_has_not_fallen_for_the_patience():
    rounds = [{"loss": loss} for loss in (0.9, 0.7, 0.8, 0.7)]
    assert [is_over(rounds[:n], 2) for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert best_of(rounds) == 1


def test_a_sample_has_its_own_seed_whoever_draws_it():
    of = Round(2, seed=7)
    ids = {of.sample_id(label, index) for label in range(6) for index in range(100)}
    assert len({of.seed_of(id_) for id_ in ids}) == len(ids) == 600
    assert of.seed_of("002-0001-00003") == Round(2, seed=7).seed_of("002-0001-00003")
    assert of.seed_of("002-0001-00003") != Round(2, seed=8).seed_of("002-0001-00003")
    assert all(0 <= of.seed_of(id_) < 2**31 for id_ in ids)


def prepared(run: Run, *more: str) -> Lineage:
    of = Run((*run.overrides, *more))
    of.stage("prepare")
    return of.lineage


def test_the_seed_is_gold_and_its_parts_are_disjoint_and_hold_the_examples(run):
    lineage = prepared(run, "guide.seed_rows=100")
    make_seed(lineage)
    task = lineage.experiment.task
    train, validation = (
        read_seed(lineage.seed.path, [part], task.label_names) for part in (TRAIN, VALIDATION)
    )
    assert (len(train.texts), len(validation.texts)) == (80, 20)
    assert not set(train.texts) & set(validation.texts)
    assert {example.text for example in task.examples} <= set(train.texts)
    rows = pq.read_table(lineage.seed.path / TRAIN).to_pylist()
    assert all(row["label"] == row["gold"] and row["confidence"] == 1.0 for row in rows)


def test_a_trained_student_is_validated_on_rows_that_it_has_not_seen(run):
    lineage = prepared(run, "guide.start=student", "guide.seed_rows=100")
    make_seed(lineage)
    held_out = {row["text"]: row["gold"] for row in rows_of(lineage, "validation")}
    names = lineage.experiment.task.label_names
    train, validation = (
        read_seed(lineage.seed.path, [part], names) for part in (TRAIN, VALIDATION)
    )
    assert (len(train.texts), len(validation.texts)) == (80, 20)
    assert [held_out[text] for text in validation.texts] == [names[at] for at in validation.gold]
    assert not set(train.texts) & set(held_out)
    few = prepared(run, "guide.start=student", "guide.validation_fraction=0.9")
    with pytest.raises(
        ConfigError, match=r"the validation split has \d+ rows with gold for it, of 9"
    ):
        make_seed(few)


def test_what_a_seed_needs_is_said_in_one_line(run):
    lineage = prepared(run, "guide.seed_rows=9000")
    with pytest.raises(ConfigError, match=r"guide\.seed_rows = 9000: beside 20 task\.examples"):
        make_seed(lineage)


def test_only_a_language_model_writes(run):
    experiment = load_experiment(QUICKSTART, [*run.overrides, "teacher.kind=scripted"])
    with pytest.raises(ConfigError, match=r"set teacher\.kind = 'vllm' or 'http'"):
        author_of(experiment)


def test_of_gold_rows_the_teacher_is_shown_those_of_the_seed_alone(run):
    lineage = prepared(run, "guide.seed_rows=100", "teacher.shots.kind=balanced")
    make_seed(lineage)
    seed = read_seed(lineage.seed.path, [TRAIN], lineage.experiment.task.label_names)
    pool = opening_of(lineage.experiment, seed).pool
    assert [example.text for example in pool] == list(seed.texts)


def test_another_setting_makes_other_rounds_and_more_rounds_keep_those_there(run):
    lineage = Lineage(run.experiment)

    def changed(override: str) -> Lineage:
        return Lineage(load_experiment(QUICKSTART, [*run.overrides, override]))

    assert changed("guide.rounds=9").round(3).path == lineage.round(3).path
    assert changed("guide.rounds=9").guided.path != lineage.guided.path
    assert changed("guide.samples=9").lessons(1).path != lineage.lessons(1).path
    assert changed("guide.samples=9").round(0).path == lineage.round(0).path
    assert changed("guide.checks.near=0.8").round(2).path != lineage.round(2).path
    assert lineage.round(20).path != lineage.round(19).path


def test_a_guided_student_takes_the_place_of_the_trained_one_wherever_a_student_is_asked_for(run):
    more = ("serve.student=guided", 'evaluate.compare_rules=["all"]')
    lineage = Run((*run.overrides, *more)).lineage
    assert lineage.own is lineage.guided
    assert lineage.served.inputs["guided"] == lineage.guided.fingerprint
    assert list(lineage.students) == ["guided", "all"]
    assert lineage.cascade.inputs["guided"] == lineage.guided.fingerprint
    assert lineage.bench.inputs["onnx"] == lineage.onnx("guided").fingerprint
    assert lineage.bench.path != run.lineage.bench.path
    assert lineage.guided.path == run.lineage.guided.path
    on_torch = Run((*run.overrides, *more, "serve.backend=torch")).lineage
    assert on_torch.served is on_torch.guided
    with pytest.raises(ArtifactError, match=r"run python jobs/guide\.py"):
        application_of("student", lineage, lineage.experiment.serve)


def test_rounds_that_start_from_a_student_do_not_follow_from_what_was_written_after_it(run):
    def of(*more):
        return Run((*run.overrides, "guide.start=student", *more)).lineage

    plain, more = of(), of("train.lessons=true")
    assert plain.round(0).path == more.round(0).path == plain.student().path
    assert plain.round(0).path == run.lineage.student().path
    assert plain.guided.path == more.guided.path != run.lineage.guided.path
    assert more.student().inputs == {"mixture": more.mixture.fingerprint}
    assert more.mixture.inputs["guided"] == plain.guided.fingerprint
    assert more.comparison.path != plain.comparison.path


def test_a_round_that_goes_on_from_the_last_student_is_another_round(run):
    fresh, last = run.lineage, Run((*run.overrides, "guide.weights=last")).lineage
    assert last.round(0).path == fresh.round(0).path
    assert last.lessons(1).path == fresh.lessons(1).path
    assert last.round(1).path != fresh.round(1).path
    assert last.lessons(2).path != fresh.lessons(2).path
    assert last.guided.path != fresh.guided.path


def test_the_rule_of_rounds_that_start_from_a_student_is_one_of_the_guided_student(run):
    def of(*more):
        return Run((*run.overrides, "guide.start=student", *more)).lineage

    assert of("guide.rule=llkd").round(0).path == of().round(0).path
    assert of("guide.rule=llkd").guided.path != of().guided.path
    assert of("guide.rule=llkd").mixture.path != of().mixture.path


def test_rows_of_a_round_that_is_not_there_are_missed(run, tmp_path):
    with pytest.raises(ArtifactError, match=r"lessons .* is not there"):
        lay_out([run.lineage.lessons(1)], tmp_path / "out")


def with_untrained_student(lineage: Lineage) -> None:
    """Make seed and round 0, whose student has learned nothing: no training, and much to say."""
    make_seed(lineage)
    experiment = lineage.experiment
    with make(lineage.round(0)) as draft:
        model = load_untrained(experiment.student, experiment.task.label_names, seed=0)
        model.save_pretrained(draft.folder / "model")
        load_tokenizer(locate(experiment.student.model)).save_pretrained(draft.folder / "model")
        for name, columns in ((train.AUDIT, schema.AUDIT), (train.EPOCHS, schema.EPOCHS)):
            pq.write_table(columns.empty_table(), draft.folder / name)
        report, _ = report_of(draft.folder / "model", lineage.seed.path, experiment)
        (draft.folder / "report.json").write_text(json.dumps(asdict(report)))
        draft.rows = Rows(taken=48, kept=48, rejected=0)


def rows_of(lineage: Lineage, split: str) -> list[dict]:
    return pq.read_table(lineage.corpus.path / split, columns=["text", "gold"]).to_pylist()


def lay_out_written(lineage: Lineage, rows: list[dict]) -> None:
    """Leave texts as a killed round would that had just written its last one."""
    names, making = lineage.experiment.task.label_names, lineage.lessons(1).making
    (making / "parts").mkdir(parents=True)
    prompts = []
    for name in names:
        of_label = [row for row in rows if row["gold"] == name]
        prompt_id = Round(1, 0).sample_id(names.index(name), 0)
        written = [
            {
                "sample_id": f"{prompt_id}-{at}",
                "prompt_id": prompt_id,
                "label": name,
                "seed": at,
                "text": row["text"],
                "finished": row.get("finished", True),
                "logprobs": np.log(np.where(np.arange(6) == names.index(row["read"]), 0.8, 0.04)),
                **dict.fromkeys(
                    ("tokens", "prompt_tokens", "cached_tokens", "readout_tokens",
                     "readout_cached_tokens"), 1),
                "error": row.get("error"),
            }
            for at, row in enumerate(of_label)
        ]  # fmt: skip
        pq.write_table(
            pa.Table.from_pylist(written, schema.written(6)),
            making / f"parts/{prompt_id}.parquet",
        )
        prompts.append(
            {"prompt_id": prompt_id, "label": name, "first": 0, "samples": 1, "text": "Question:"}
        )
    pq.write_table(pa.Table.from_pylist(prompts, schema.PROMPTS), making / "prompts.parquet")


def test_a_teacher_that_gives_errors_ends_the_round_and_is_asked_again(tmp_path, small_encoder):
    lineage = prepared(
        Run((f"runs={tmp_path}", "guide.seed_rows=100", f"student.model={small_encoder}"))
    )
    with_untrained_student(lineage)
    good = rows_of(lineage, "unlabeled")[:40]
    refused = [
        row | {"read": row["gold"], "error": "400 Bad Request" if at else None}
        for at, row in enumerate(good)
    ]
    lay_out_written(lineage, refused)
    with pytest.raises(TeacherError, match=r"39 of 40 texts could not be written.*400 Bad Request"):
        make_lessons(lineage, 1)
    assert not lineage.lessons(1).made
    left = list((lineage.lessons(1).making / "parts").iterdir())
    errors = [pq.read_table(part).column("error").drop_null() for part in left]
    assert sum(map(len, errors)) == 0


@pytest.mark.parametrize(("endless", "told"), [(4, False), (5, True)])
def test_where_many_texts_come_to_no_end_the_setting_is_named(
    tmp_path, small_encoder, caplog, endless, told
):
    lineage = prepared(
        Run((f"runs={tmp_path}", "guide.seed_rows=100", f"student.model={small_encoder}"))
    )
    with_untrained_student(lineage)
    rows = [
        row | {"read": row["gold"], "finished": at >= endless}
        for at, row in enumerate(rows_of(lineage, "unlabeled")[:40])
    ]
    lay_out_written(lineage, rows)
    make_lessons(lineage, 1)
    setting = f"{endless} of 40 texts came to no end within guide.sampling.max_tokens = 64"
    assert (setting in caplog.text) == told


def test_the_loss_of_a_round_is_that_of_before_the_temperature(tmp_path, small_encoder):
    lineage = prepared(
        Run((f"runs={tmp_path}", "guide.seed_rows=100", f"student.model={small_encoder}"))
    )
    with_untrained_student(lineage)
    student = lineage.round(0).path / train.MODEL
    before, _ = report_of(student, lineage.seed.path, lineage.experiment)
    set_temperature(student, Temperature(0.1, "gold", 20))
    after, _ = report_of(student, lineage.seed.path, lineage.experiment)
    assert after.loss == pytest.approx(before.loss, rel=1e-4)
    assert after.classes == before.classes


def test_what_is_written_is_not_asked_for_again_and_every_text_is_kept_or_has_its_reason(
    tmp_path, small_encoder
):
    lineage = prepared(
        Run((f"runs={tmp_path}", "guide.seed_rows=100", f"student.model={small_encoder}"))
    )
    with_untrained_student(lineage)
    shown = set(
        read_seed(lineage.seed.path, [TRAIN, VALIDATION], lineage.experiment.task.label_names).texts
    )
    fresh = [row for row in rows_of(lineage, "unlabeled") if row["text"] not in shown][:200]
    good = [row | {"read": row["gold"]} for row in fresh if len(row["text"].split()) > 4]
    leak = rows_of(lineage, "test")[0]
    other = next(row for row in rows_of(lineage, "validation") if row["gold"] != leak["gold"])
    planted = {
        "the same as a text of the test split": leak,
        "the same as a text of the validation split": other | {"text": other["text"].upper()},
        "no end": good[-1] | {"finished": False},
        "the teacher reads another label": good[-2] | {"read": leak["gold"]},
    }
    if good[-2]["gold"] == leak["gold"]:
        planted["the teacher reads another label"]["read"] = other["gold"]
    bad = [{"read": row["gold"], **row} for row in planted.values()]
    lay_out_written(lineage, [*good[:-2], *bad])

    make_lessons(lineage, 1)

    folder, manifest = lineage.lessons(1).path, lineage.lessons(1).manifest()
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert len(samples) == len(good) - 2 + 4 == manifest.rows.taken
    dropped = {row["text"]: row["dropped"] for row in samples}
    for reason, row in planted.items():
        assert dropped[row["text"]] == reason
    kept = pq.read_table(folder / "unlabeled").to_pylist()
    assert [row["text"] for row in kept] == [
        row["text"] for row in samples if row["dropped"] is None
    ]
    assert manifest.rows.kept == len(kept) > 0.7 * len(good)
    assert sum(manifest.details["dropped"].values()) == manifest.rows.rejected
    assert all(row["gold"] is None and row["confidence"] > 0.5 for row in kept)
    card = (folder / "README.md").read_text()
    assert f"{len(kept)} of {len(samples)} texts" in card
    assert "| no end | 1 |" in card
    assert not (folder / "parts").exists()

    # A kill when all is done but the commit; without Ray, nobody could be asked again.
    folder.rename(lineage.lessons(1).making)
    (lineage.lessons(1).making / MANIFEST).unlink()
    make_lessons(lineage, 1)
    assert pq.read_table(folder / "samples.parquet").to_pylist() == samples
    assert pq.read_table(folder / "unlabeled").to_pylist() == kept


def kill_after_the_first_part(job: subprocess.Popen[bytes], parts: Path) -> None:
    with job:
        deadline = time.monotonic() + 300
        while not list(parts.glob("[0-9]*.parquet")):
            assert job.poll() is None, "the job ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(job.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_round_that_is_killed_ends_with_the_rows_of_an_unbroken_one(tmp_path, small_encoder):
    overrides = (
        "corpus.validation_fraction=0.02",
        "corpus.test_fraction=0.02",
        "evaluate.bootstrap_resamples=100",
        *("guide.seed_rows=60", "guide.rounds=1", "guide.samples=24"),
        *("guide.samples_per_prompt=4", "guide.checks.min_confidence=0.3"),
        *(f"student.model={small_encoder}", "student.max_length=64", "train.epochs=2"),
        *("train.num_workers=1", "teacher.actors.batches_in_flight=1"),
    )
    run = Run((f"runs={tmp_path / 'broken'}", *overrides))
    broken = prepared(run)
    with_untrained_student(broken)
    unbroken = Lineage(load_experiment(QUICKSTART, [f"runs={tmp_path / 'unbroken'}", *overrides]))
    shutil.copytree(broken.run, unbroken.run)

    parts = broken.lessons(1).making / "parts"
    killed = subprocess.Popen(
        command("guide", str(QUICKSTART), *run.overrides),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    killer = ThreadPoolExecutor(1).submit(kill_after_the_first_part, killed, parts)
    make_lessons(unbroken, 1)  # Meanwhile: an engine takes long to start.
    killer.result()
    time.sleep(3)  # What Ray had under way may still land.
    assert 1 <= len(list(parts.glob("[0-9]*.parquet"))) < 6
    run.stage("guide")

    columns = ["sample_id", "prompt_id", "seed", "text", "read_label", "student_label", "dropped"]
    ours, other = (
        pq.read_table(of.lessons(1).path / "samples.parquet", columns=columns).to_pylist()
        for of in (broken, unbroken)
    )
    assert len(ours) == 24
    assert ours == other
    prompts = pq.read_table(broken.lessons(1).path / "prompts.parquet").column("prompt_id")
    assert {row["prompt_id"] for row in ours} == set(prompts.to_pylist())
    kept = pq.read_table(broken.lessons(1).path / "unlabeled")
    assert kept.schema.names == schema.labels(6).names
    assert kept.column("text").to_pylist() == [
        row["text"] for row in ours if row["dropped"] is None
    ]
    assert broken.lessons(1).manifest().rows.kept == len(kept)
    assert "a language model, round 1" in (broken.lessons(1).path / "README.md").read_text()

    rounds = json.loads((broken.guided.path / "rounds.json").read_text())
    assert [of["round"] for of in rounds] == [0, 1]
    assert rounds[1]["training_rows"] == 48 + len(kept)
    best = broken.guided.manifest().details["best_round"]
    assert rounds[best]["loss"] == min(of["loss"] for of in rounds)
    guided = Lineage(load_experiment(QUICKSTART, [*run.overrides, "serve.student=guided"]))
    assert guided.served.manifest().inputs["guided"] == broken.guided.fingerprint
    assert application_of("student", guided, guided.experiment.serve) is not None
    card = (broken.round(1).path / "model/README.md").read_text()
    assert f"48 texts labelled by people and {len(kept)} written by a language model" in card


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_small_model_is_held_to_json(tmp_path):
    experiment = load_experiment(QUICKSTART, [f"runs={tmp_path}"])
    prompt = {
        "prompt_id": "p",
        "label": "person",
        "first": 0,
        "samples": 8,
        "text": prompt_of(experiment.task, room=1000, form="json"),
    }
    written = write(
        pa.Table.from_pylist([prompt], schema.PROMPTS),
        tmp_path / "parts",
        opening=Opening.of(experiment),
        sampling=SamplingSection(form="json", temperature=0.7),
        of=Round(1, 0),
    ).to_pylist()
    ended = [row for row in written if row["finished"]]
    assert len(ended) >= 4
    assert all(row["text"] and row["error"] is None for row in ended)
    assert not any("{" in row["text"] or row["text"].endswith('"}') for row in ended)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_trained_student_is_guided_and_what_was_written_for_it_trains_another(
    tmp_path, small_encoder
):
    run = Run(
        (
            *(f"runs={tmp_path}", "corpus.validation_fraction=0.02", "corpus.test_fraction=0.02"),
            *("guide.start=student", "guide.seed_rows=60", "guide.rounds=1"),
            *(f"student.model={small_encoder}", "student.max_length=64", "train.epochs=2"),
            *("train.num_workers=1", "serve.backend=torch", "evaluate.bootstrap_resamples=50"),
        )
    )
    run.stage("prepare")
    lineage, names = run.lineage, run.experiment.task.label_names
    unlabeled = pq.read_table(lineage.corpus.path / "unlabeled").to_pylist()
    with make(lineage.labels) as draft:
        (draft.folder / TRAIN).mkdir()
        write_labelled(draft.folder / TRAIN / SHARD, unlabeled[:150], names)
        draft.rows = Rows(taken=150, kept=150, rejected=0)
    # Ten of the texts that the teacher wrote in round 1 stand among the labels, too.
    rows = [row | {"read": row["gold"]} for row in unlabeled[140:150] + unlabeled[200:300]]
    lay_out_written(lineage, rows)

    run.stage("guide")
    rounds = json.loads((lineage.guided.path / "rounds.json").read_text())
    kept = set(pq.read_table(lineage.lessons(1).path / TRAIN).column("row_id").to_pylist())
    labelled = {row["row_id"] for row in unlabeled[:150]}
    seed = set(pq.read_table(lineage.seed.path / TRAIN).column("row_id").to_pylist())
    assert len(kept) > 20
    assert kept & labelled - seed
    assert [of["training_rows"] for of in rounds] == [150, len(seed | kept | labelled)]
    report, _ = report_of(lineage.student().path / "model", lineage.seed.path, run.experiment)
    assert rounds[0]["loss"] == report.loss
    assert "labelled by one" in (lineage.round(1).path / "model/README.md").read_text()

    more = Run((*run.overrides, "train.lessons=true"))
    more.stage("train")
    mixture = more.lineage.mixture
    assert mixture.manifest().rows.kept == len(kept | labelled)
    assert mixture.manifest().rows.rejected == len(kept & labelled)
    assert mixture.manifest().details["rows"] == {
        lineage.lessons(1).path.name: len(kept),
        lineage.labels.path.name: len(labelled - kept),
    }
    assert more.lineage.student().manifest().rows.kept == len(kept | labelled)
    card = (more.lineage.student().path / "model/README.md").read_text()
    assert f"{len(kept)} that it wrote itself" in card
    told = tell(lineage.run, min(kept - labelled))
    assert [story.student for story in told] == [more.lineage.student().path]
