"""What a generated row must pass: planted leaks, noise, disagreement."""

import numpy as np
import pytest
from training_data import questions

from llkd_ray.config import ChecksSection
from llkd_ray.guided import duplicates
from llkd_ray.guided.checks import Checks, Sample
from llkd_ray.guided.duplicates import Seen, normal_words
from llkd_ray.guided.form import Form
from llkd_ray.guided.sift import calibrated

SURE, UNSURE = np.array([0.002, 0.996, 0.002]), np.array([0.3, 0.4, 0.3])
ALIKE = np.array([1 / 3, 1 / 3, 1 / 3])


@pytest.fixture(scope="module")
def texts():
    return [text for _, text, _ in questions()]


def checks_of(seed, held_out=(), **section):
    checks = ChecksSection.model_validate(section)
    seen = Seen(checks.near)
    for text in seed:
        seen.add("the seed", text)
    for text in held_out:
        seen.add("the test split", text, held_out=True)
    return Checks(checks, Form.of(seed, checks, ("Question:", "Label:")), seen)


def sample(text, *, teacher=SURE, student=ALIKE, label=1, finished=True, error=None):
    return Sample(text, label, finished, error, teacher, student)


def one_word_changed(text, rng):
    words = text.split()
    words[rng.integers(len(words))] = "zebra"
    return " ".join(words)


def test_every_planted_leak_is_caught(texts):
    rng = np.random.default_rng(0)
    seed, held_out = texts[:100], texts[100:500]
    checks = checks_of(seed, held_out, length=(0.01, 10.0), noise=False)
    for text in held_out:
        for leak in (
            text,
            text.upper(),
            text.replace(" ", "  ") + "!",
            one_word_changed(text, rng),
        ):
            reason = checks.reason_against(sample(leak))
            assert reason is not None
            assert reason.endswith(("the test split", "the seed")), (leak, reason)


def test_repeated_seed_rows_are_caught_exact_recased_and_nearly(texts):
    checks = checks_of(texts[:300])
    for text in texts[:300]:
        for copy in (text, text.lower(), text + " ?"):
            assert checks.reason_against(sample(copy)) == "the same as a text of the seed"
    seen = Seen(0.9)
    seen.add("the seed", "What is the capital of the republic of Yugoslavia ?")
    assert seen.find("What is the capital of the Republics of Yugoslavia?") == (
        "nearly the same as a text of the seed"
    )
    # Of the seed, another word may make another question.
    assert seen.find("What is the capital of the republic of Malta ?") is None


def test_most_real_questions_are_no_leak_of_others(texts):
    checks = checks_of(texts[:200], texts[200:1200], length=(0.5, 2.0))
    passed = [checks.reason_against(sample(text)) is None for text in texts[2000:2300]]
    assert np.mean(passed) > 0.8


def test_a_row_that_was_kept_is_not_kept_again_and_a_dropped_one_does_not_count():
    checks = checks_of(["What is it ?", "Who was the man with the golden gun ?"])
    text = "Who was the gun with the man ?"
    assert checks.reason_against(sample(text, student=SURE)) == "the student is sure"
    assert checks.reason_against(sample(text)) is None
    assert (
        checks.reason_against(sample(text.lower())) == "the same as a text of other generated rows"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no text"),
        ("Who", "too short"),
        ("Who was it that " * 5, "too long"),
        ("Who was \U0001f600 then ?", "characters that are foreign to the seed"),
        ("Кто это был ?", "characters that are foreign to the seed"),
        ("who was who was who was who was who", "words over and over"),
        ("Who was it Question: who", "a part of the prompt"),
    ],
)
def test_a_text_without_the_form_of_the_seed_is_dropped(text, reason):
    seed = ["Who was the man with a golden gun: he ?", "What quiet bell labels Q ?"]
    assert checks_of(seed).reason_against(sample(text)) == reason


def test_accents_and_signs_of_the_same_script_are_not_foreign():
    checks = checks_of(["Who was the man with a golden gun ?"])
    assert checks.reason_against(sample("Was it “Señor” Q & 5 % ?")) is None


def test_the_teacher_and_the_student_have_their_say():
    checks = checks_of(["Who was the man with the golden gun ?"], min_confidence=0.5)
    text = "Who was the gun ?"
    drop = checks.reason_against
    assert drop(sample(text, finished=False)) == "no end"
    assert drop(sample(text, error="ValueError: too long")) == "ValueError: too long"
    assert drop(sample(text, label=0)) == "the teacher reads another label"
    assert drop(sample(text, teacher=np.full(3, np.nan))) == "the teacher reads another label"
    assert drop(sample(text, teacher=UNSURE)) == "the teacher is not sure"
    assert drop(sample("", finished=False)) == "no end"
    assert drop(sample(text, student=np.array([0.0, 1.0, 0.0]))) == "the student is sure"
    # Of another label: that is what it has to learn.
    wrong = checks_of(["Who was the man with the golden gun ?"])
    assert wrong.reason_against(sample(text, student=np.array([0.0, 0.0, 1.0]))) is None
    both = checks_of(["Who was the man with the golden gun ?"], student_agrees=True)
    assert (
        both.reason_against(sample(text, student=np.array([0.0, 0.4, 0.6])))
        == "the student reads another label"
    )
    assert both.reason_against(sample(text, student=np.array([0.0, 0.6, 0.4]))) is None
    assert drop(sample(text)) is None
    trusting = checks_of(["Who was the man with the golden gun ?"], min_confidence=0.0)
    assert trusting.reason_against(sample(text, label=0)) is None


def test_normal_words_forget_case_punctuation_and_white_space():
    assert normal_words("  What's “THIS”, \n then, at 3 p.m. ?") == [
        *("whats", "this", "then", "at", "3", "pm")
    ]
    assert normal_words("\uff37\uff28\uff29\uff34\uff25") == ["white"]
    assert normal_words("GPT\u6a21\u578b\u3002 \u597d") == ["gpt", "\u6a21", "\u578b", "\u597d"]


def test_of_scripts_without_spaces_a_sign_is_a_word():
    text = "\u8fd9\u90e8\u7535\u5f71\u975e\u5e38\u597d\u770b"
    seed = ["\u6211\u7684\u94f6\u884c\u5361\u4e22\u4e86\u600e\u4e48\u529e\uff1f"]
    checks = checks_of(seed, [text])
    assert checks.seen.find(text.replace("\u597d", "\u96be")) == (
        "nearly the same as a text of the test split"
    )
    assert checks.reason_against(sample("\u6628\u5929\u4e70\u7684\u624b\u673a\u574f\u4e86")) is None
    assert checks.reason_against(sample("\u6628\u5929")) == "too short"


def test_another_word_is_no_leak_of_a_single_one():
    seen = Seen(0.9)
    seen.add("the test split", "Refund", held_out=True)
    seen.add("the test split", "reset password", held_out=True)
    leak = "nearly the same as a text of the test split"
    assert [seen.find(text) for text in ("hello", "refund now", "change password", "reset")] == [
        *(None, leak, leak, leak)
    ]


def test_more_words_than_there_are_codes_drop_a_text_too_many_at_most(monkeypatch):
    monkeypatch.setattr(duplicates, "_CODES", 4)
    seen = Seen(0.9)
    seen.add("the test split", "one two three four five six", held_out=True)
    assert seen.find("one two three four five sixteen") is not None
    assert seen.find("ten eleven twelve") is None


def test_a_label_that_no_text_was_written_for_is_not_taken_for_a_rare_one():
    logprobs = np.log([[0.94, 0.02, 0.02, 0.02], [0.9, 0.05, 0.03, 0.02]])
    np.testing.assert_allclose(calibrated(logprobs, np.array([0, 0])), np.exp(logprobs))
    logprobs = np.log([[0.9, 0.1], [0.6, 0.4]])
    assert calibrated(logprobs, np.array([0, 1])).argmax(axis=1).tolist() == [0, 1]
