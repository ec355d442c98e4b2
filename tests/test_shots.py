import itertools
from pathlib import Path

import numpy as np
import pytest

from llkd_ray.config import Example, Label, ShotsSection, TaskSection
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.shots import choose_shots

LABELS = (Label(name="a"), Label(name="b"), Label(name="c"))
OWN = (Example(text="own b", label="b"), Example(text="own a", label="a"))
TASK = TaskSection(labels=LABELS, examples=OWN)
POOL = tuple(Example(text=f"pool {n}", label="abc"[n % 3]) for n in range(15))
TOPICS = (
    Example(text="The striker scored twice in the final.", label="a"),
    Example(text="Interest rates rose for a third month.", label="b"),
    Example(text="A new telescope found a distant planet.", label="c"),
    Example(text="The goalkeeper saved a penalty.", label="a"),
    Example(text="The bank reported a loss.", label="b"),
)


def test_fixed_examples_are_shown_as_they_stand() -> None:
    shots = choose_shots(TASK, ShotsSection(kind="fixed"), POOL)
    assert shots.shared == OWN
    assert shots.own(["x", "y"]) == [(), ()]


def test_balanced_examples_are_so_many_of_each_label_and_the_tasks_own_come_first() -> None:
    section = ShotsSection(kind="balanced", per_label=3)
    shared = choose_shots(TASK, section, POOL).shared
    assert sorted(shot.label for shot in shared) == list("aaabbbccc")
    assert set(OWN) < set(shared)
    assert len(set(shared)) == 9
    assert shared == choose_shots(TASK, section, POOL).shared


@pytest.mark.parametrize("names", ["ab", "abc", "abcdefg"])
def test_balanced_labels_alternate_in_an_order_that_changes(names: str) -> None:
    task = TaskSection(labels=tuple(Label(name=name) for name in names))
    pool = [Example(text=f"{name} {n}", label=name) for name in names for n in range(5)]
    shown = [
        shot.label
        for shot in choose_shots(task, ShotsSection(kind="balanced", per_label=5), pool).shared
    ]
    assert all(one != other for one, other in itertools.pairwise(shown))
    rounds = [
        tuple(shown[start : start + len(names)]) for start in range(0, len(shown), len(names))
    ]
    assert all(sorted(labels) == list(names) for labels in rounds)
    if len(names) > 2:
        assert len(set(rounds)) > 1


def test_the_same_text_is_one_example() -> None:
    task = TaskSection(labels=LABELS[:2], examples=(Example(text="same  text", label="a"),))
    pool = (Example(text="same text", label="a"), Example(text="b", label="b"))
    with pytest.raises(TeacherError, match=r"per_label = 2: the label 'a' has 1 examples"):
        choose_shots(task, ShotsSection(kind="balanced", per_label=2), pool)


def test_a_label_without_enough_examples_is_told() -> None:
    with pytest.raises(TeacherError, match=r"per_label = 3: the label 'c' has 2 examples"):
        choose_shots(TASK, ShotsSection(kind="balanced", per_label=3), POOL[:8])


def test_the_nearest_example_is_shown_last() -> None:
    task = TaskSection(labels=LABELS)
    shots = choose_shots(task, ShotsSection(kind="nearest", nearest=2), TOPICS)
    football, money = shots.own(["They lost the football match.", "Shares of the lender fell."])
    assert {shot.label for shot in football} == {"a"}
    assert {shot.label for shot in money} == {"b"}
    assert money[-1].text == "The bank reported a loss."
    assert shots.shared == ()
    assert shots.own([]) == []


def test_a_text_is_never_its_own_example() -> None:
    task = TaskSection(labels=LABELS, examples=TOPICS)
    shots = choose_shots(task, ShotsSection(kind="nearest", nearest=8))
    for topic in TOPICS:
        shown = shots.own([f" {topic.text}\n"])[0]
        assert set(shown) == set(TOPICS) - {topic}


def test_embeddings_are_the_mean_over_tokens_whatever_the_neighbours() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from llkd_ray import embedded

    folder = embedded.locate(embedded.STUDENTS["minilm-l6"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    shots = choose_shots(TaskSection(labels=LABELS), ShotsSection(kind="nearest"), TOPICS)
    with torch.inference_mode():
        naive = [
            model(**tokenizer(topic.text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
            for topic in TOPICS
        ]
    expected = np.array([vector / np.linalg.norm(vector) for vector in naive])
    np.testing.assert_allclose(shots.embeddings, expected, atol=1e-5)  # type: ignore[attr-defined]


def test_nearest_without_examples_or_encoder_is_told(tmp_path: Path) -> None:
    task = TaskSection(labels=LABELS)
    with pytest.raises(TeacherError, match=r"no examples to choose from"):
        choose_shots(task, ShotsSection(kind="nearest"))
    section = ShotsSection(kind="nearest", encoder=str(tmp_path))
    with pytest.raises(TeacherError, match=r"teacher\.shots\.encoder"):
        choose_shots(task, section, POOL)
