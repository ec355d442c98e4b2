import math
from functools import partial
from typing import Any, Literal

import pytest
from conftest import QUICKSTART
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llkd_ray.config import (
    Example,
    Label,
    PromptSection,
    TaskSection,
    VLLMTeacher,
    load_experiment,
)
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.prompt import Prompt
from llkd_ray.teacher.verbalizer import choose_readout

UNKNOWN = "<unk>"
# Long shared beginnings, and one label that is the beginning of others.
CARDS = (
    "card payment",
    "card payment fee charged",
    "card payment wrong exchange rate",
    "card arrival",
    "cash withdrawal charge",
    "top up failed",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The real teacher's."""
    return AutoTokenizer.from_pretrained(_folder(), trust_remote_code=False)


def _folder() -> Any:
    return teacher_folder("smollm2-135m-instruct", load_experiment(QUICKSTART).cache)


def _task(*words: str) -> TaskSection:
    return TaskSection(
        labels=tuple(Label(name=said) for said in words),
        examples=(Example(text="What is this fee?", label=words[-1]),),
    )


def _teacher(readout: Any = "auto", form: Literal["plain", "chat"] = "plain") -> VLLMTeacher:
    return VLLMTeacher(readout=readout, prompt=PromptSection(format=form))


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_each_label_is_read_at_its_own_token(tokenizer: Any, form: Any) -> None:
    task = load_experiment(QUICKSTART).task
    readout = choose_readout(tokenizer, task, _teacher(form=form))
    gap = " " if form == "plain" else ""
    (branch,) = readout.branches
    assert branch.path == ()
    for token, label in zip(branch.tokens, task.labels, strict=True):
        assert (gap + (label.words or label.name)).startswith(tokenizer.decode([token]))
    assert readout.kind == "first_token"
    assert "6 labels begin with 6 different tokens, one pass a row" in readout.why


def test_what_is_read_comes_back_in_the_order_of_the_labels(tokenizer: Any) -> None:
    readout = choose_readout(tokenizer, _task("good", "bad", "ugly"), _teacher())
    tokens = [tokenizer(f" {said}")["input_ids"][0] for said in ("good", "bad", "ugly")]
    assert readout.logprobs([dict(zip(tokens, (-1.0, -2.0, -3.0), strict=True))]) == [
        -1.0,
        -2.0,
        -3.0,
    ]


def test_labels_that_begin_alike_are_read_token_by_token(tokenizer: Any) -> None:
    readout = choose_readout(tokenizer, _task("new york", "new jersey", "boston"), _teacher())
    assert readout.kind == "trie"
    assert "'new york' and 'new jersey' begin with the same token ' new'" in readout.why
    assert "'letters' would take one" in readout.why
    decoded = {
        tokenizer.decode(branch.path): [tokenizer.decode([token]) for token in branch.tokens]
        for branch in readout.branches
    }
    assert len(decoded[" new"]) == 2
    assert decoded[""][0] == " new"
    assert " boston".startswith(decoded[""][1])
    assert f"{len(readout.branches)} passes a row" in readout.why


def test_answers_end_where_one_begins_another(tokenizer: Any) -> None:
    plain = choose_readout(tokenizer, _task(*CARDS), _teacher())
    assert {tokenizer.decode(path[-1:]) for path in plain.paths} == {"\n"}
    chat = choose_readout(tokenizer, _task(*CARDS), _teacher(form="chat"))
    assert {tokenizer.decode(path[-1:]) for path in chat.paths} == {"<|im_end|>"}
    for readout in (plain, chat):
        paths = readout.paths
        assert not any(
            one != other and other[: len(one)] == one for one in paths for other in paths
        )
    free = choose_readout(tokenizer, _task(*CARDS[1:]), _teacher())
    assert all(tokenizer.decode(path[-1:]) != "\n" for path in free.paths)


def test_letters_are_offered_and_read_in_one_pass(tokenizer: Any) -> None:
    task = _task(*CARDS)
    prompt = Prompt.of(tokenizer, task, _teacher("letters"))
    (branch,) = prompt.readout.branches
    assert [tokenizer.decode([token]) for token in branch.tokens] == [
        f" {letter}" for letter in "ABCDEF"
    ]
    rendered = prompt.render("Why?")
    assert "A: card payment\nB: card payment fee charged\n" in rendered
    assert rendered.endswith("Text: What is this fee?\nLabel: F\n\nText: Why?\nLabel:")


def test_more_tokens_than_one_pass_returns_are_read_in_several(tokenizer: Any) -> None:
    words = [
        word[1:]
        for word in tokenizer.convert_ids_to_tokens(range(1000, 3000))
        if word.startswith("\u0120") and word[1:].isascii() and word[1:].islower()
    ][:150]
    readout = choose_readout(tokenizer, _task(*words), _teacher())
    assert readout.kind == "first_token"
    assert [len(branch.tokens) for branch in readout.branches] == [128, 22]
    assert {branch.path for branch in readout.branches} == {()}
    assert "2 passes a row" in readout.why
    reads = [{token: -float(token) for token in branch.tokens} for branch in readout.branches]
    assert readout.logprobs(reads) == [-float(path[0]) for path in readout.paths]


@pytest.mark.parametrize(
    ("words", "readout", "told"),
    [
        (("new york", "new jersey"), "first_token", r"same token ' new'.*'letters' or 'trie'"),
        (tuple(f"l{n}" for n in range(27)), "letters", r"27 labels and 26 letters.*'trie'"),
    ],
)
def test_a_readout_that_the_labels_do_not_allow_is_told(
    tokenizer: Any, words: tuple[str, ...], readout: str, told: str
) -> None:
    with pytest.raises(TeacherError, match=told):
        choose_readout(tokenizer, _task(*words), _teacher(readout))


def _small(model: Any, normalizer: Any = None) -> Any:
    backend = Tokenizer(model)
    if normalizer:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN)


def test_labels_that_the_tokenizer_does_not_keep_apart_are_told() -> None:
    characters = {character: at for at, character in enumerate("\n txeLabl:yno")}
    vocabulary = {**characters, UNKNOWN: 98, ": ": 99}
    bpe = partial(models.BPE, unk_token=UNKNOWN)
    task = _task("yes", "no")
    with pytest.raises(TeacherError, match=r"apart from task\.label_prefix = 'Label:'"):
        choose_readout(_small(bpe(vocabulary, [(":", " ")])), task, _teacher())
    drops = _small(bpe(vocabulary, []), normalizers.Replace(Regex(" (yes|no)"), ""))
    with pytest.raises(TeacherError, match="makes no token of the words 'yes'"):
        choose_readout(drops, task, _teacher())
    confuses = _small(bpe(vocabulary, []), normalizers.Replace(Regex("yes|no"), "y"))
    with pytest.raises(TeacherError, match="'yes' and 'no' are the same tokens"):
        choose_readout(confuses, task, _teacher())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_the_trie_adds_up_to_the_probability_of_each_labels_words(form: Any) -> None:
    import torch

    folder = _folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    task = _task(*CARDS)
    prompt = Prompt.of(tokenizer, task, _teacher(form=form))
    ids = prompt.encode(["Why was I charged for paying by card?"])[0].ids

    def logprobs(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    reads = []
    for branch in prompt.readout.branches:
        read = logprobs([*ids, *branch.path])[-1]
        reads.append({token: float(read[token]) for token in branch.tokens})
    found = prompt.readout.logprobs(reads)

    gap, end = (" ", "\n") if form == "plain" else ("", "<|im_end|>")
    for said, value in zip(CARDS, found, strict=True):
        answer = tokenizer(gap + said + end, add_special_tokens=False)["input_ids"]
        whole = logprobs([*ids, *answer])
        naive = sum(float(whole[len(ids) - 1 + at, token]) for at, token in enumerate(answer))
        assert value == pytest.approx(naive, abs=1e-3)
    # The labels exclude one another, so together they are no more than certain.
    assert 0 < sum(map(math.exp, found)) <= 1
