"""How a label is read from the teacher: which tokens, after which, and what they add up to.

Shape legend: C classes.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llkd_ray.config import TaskSection, VLLMTeacher
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.layout import Codec, Layout, Words
from llkd_ray.teacher.wording import Wording, label_words

# vLLM returns the log-probabilities of at most this many named tokens.
_MAX_TOKENS = 128

Path = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """One forward pass of a row."""

    path: Path
    """Token ids that stand after the prompt."""
    tokens: tuple[int, ...]
    """Token ids whose log-probabilities are read there; at most 128."""


@dataclass(frozen=True)
class Readout:
    """How the C labels are read."""

    kind: Literal["first_token", "letters", "trie"]
    why: str
    """One sentence for people: which read-out, and what led to it."""
    answers: tuple[str, ...]
    """What stands for each label after the label prefix: its words, or its letter."""
    paths: tuple[Path, ...]
    """Token ids that are read for each label, one after the other."""

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """Return the forward passes of a row: one for each place where a path goes on."""
        nodes: dict[Path, dict[int, None]] = {}
        for path in self.paths:
            for depth, token in enumerate(path):
                nodes.setdefault(path[:depth], {})[token] = None
        return tuple(
            Branch(node, tuple(tokens)[start : start + _MAX_TOKENS])
            for node, tokens in nodes.items()
            for start in range(0, len(tokens), _MAX_TOKENS)
        )

    def logprobs(self, reads: Sequence[Mapping[int, float]]) -> list[float]:
        """Return the log-probability of each label [C].

        Args:
            reads: What was read at each of the branches, in their order: token id to natural
                logarithm of its probability over the full vocabulary.
        """
        at = {
            (branch.path, token): read[token]
            for branch, read in zip(self.branches, reads, strict=True)
            for token in branch.tokens
        }
        return [
            sum(at[path[:depth], token] for depth, token in enumerate(path)) for path in self.paths
        ]


def choose_readout(
    tokenizer: Any, task: TaskSection, teacher: VLLMTeacher, codec: Codec | None = None
) -> Readout:
    """Choose how the labels are read, as `teacher.readout` says.

    Args:
        tokenizer: The teacher's.
        task: The labels and their words.
        teacher: Read-out and prompt format.
        codec: Of the tokenizer, where there is one already.

    Raises:
        TeacherError: The tokenizer does not tell the labels' answers apart in this way.
    """
    codec = codec or Codec(tokenizer)
    words = label_words(task)
    layout = Layout.of(tokenizer, Wording(task, words), teacher.prompt.format)
    if teacher.readout == "letters":
        return _letters(codec, layout, task)
    paths = [_answer_ids(codec, layout, task, answer) for answer in words]
    _check_distinct(words, paths)
    clash = _first_clash(words, paths)
    if clash is None and teacher.readout != "trie":
        count = len(words)
        why = f"first_token: {count} labels begin with {count} different tokens"
        return _readout("first_token", why, words, [path[:1] for path in paths])
    if teacher.readout == "first_token":
        raise TeacherError(
            f"teacher.readout = 'first_token': {_told(codec, clash)}; give one of them other "
            "words, or set teacher.readout to 'letters' or 'trie'"
        )
    if any(_is_prefix(one, other) for one in paths for other in paths if one is not other):
        # Then "card" has to be told from the beginning of "card payment": each answer is read on
        # to the token that ends it, so that the labels exclude one another.
        end = _answer_end(codec, layout, words[0])
        paths = [(*path, end) for path in paths]
    why = "trie: " + (_told(codec, clash) if clash else "each label's words, token by token")
    return _readout("trie", why, words, paths)


def _readout(
    kind: Literal["first_token", "letters", "trie"],
    why: str,
    answers: Sequence[str],
    paths: Sequence[Path],
) -> Readout:
    passes = len(Readout(kind, why, tuple(answers), tuple(paths)).branches)
    cost = "one pass a row" if passes == 1 else f"{passes} passes a row"
    if kind == "trie" and passes > 1 and len(answers) <= len(string.ascii_uppercase):
        cost += "; teacher.readout = 'letters' would take one"
    return Readout(kind, f"{why}, {cost}", tuple(answers), tuple(paths))


def _letters(codec: Codec, layout: Layout, task: TaskSection) -> Readout:
    letters = string.ascii_uppercase[: len(task.labels)]
    if len(letters) < len(task.labels):
        raise TeacherError(
            f"teacher.readout = 'letters': {len(task.labels)} labels and 26 letters; set it to "
            "'trie'"
        )
    paths = [_answer_ids(codec, layout, task, letter) for letter in letters]
    if any(len(path) > 1 for path in paths) or len(set(paths)) < len(paths):
        raise TeacherError(
            "teacher.readout = 'letters': the teacher's tokenizer has no token for each letter; "
            "set it to 'trie'"
        )
    return _readout("letters", f"letters: {len(letters)} labels offered as options", letters, paths)


def _answer_ids(codec: Codec, layout: Layout, task: TaskSection, answer: str) -> Path:
    """Return the token ids of an answer, as they follow the question."""
    before = (Words(f" text{layout.question_end}"), *layout.reply)
    ids = codec.following(before, (Words(layout.gap + answer),))
    if ids is None:
        raise TeacherError(
            f"task.labels: the teacher's tokenizer does not keep the words {answer!r} apart from "
            f"task.label_prefix = {task.label_prefix!r}; change either"
        )
    if not ids:
        raise TeacherError(
            f"task.labels: the teacher's tokenizer makes no token of the words {answer!r}; give "
            "that label other words"
        )
    return tuple(ids)


def _answer_end(codec: Codec, layout: Layout, answer: str) -> int:
    """Return the token that follows an answer in the prompt: a line's or a turn's end."""
    ids = codec.following((Words(layout.gap + answer),), layout.between)
    # Apart where a tokenizer joins the end of the answer and the end of its line.
    return (ids or codec.ids(layout.between))[0]


def _check_distinct(words: Sequence[str], paths: Sequence[Path]) -> None:
    known: dict[Path, str] = {}
    for said, path in zip(words, paths, strict=True):
        if path in known:
            raise TeacherError(
                f"task.labels: {known[path]!r} and {said!r} are the same tokens to the teacher; "
                "give one of them other words"
            )
        known[path] = said


def _first_clash(words: Sequence[str], paths: Sequence[Path]) -> tuple[str, str, int] | None:
    """Return the first two words that begin with one token, and the token."""
    known: dict[int, str] = {}
    for said, path in zip(words, paths, strict=True):
        if path[0] in known:
            return known[path[0]], said, path[0]
        known[path[0]] = said
    return None


def _told(codec: Codec, clash: tuple[str, str, int] | None) -> str:
    assert clash is not None
    one, other, token = clash
    return f"{one!r} and {other!r} begin with the same token {codec.decode([token])!r}"


def _is_prefix(one: Path, other: Path) -> bool:
    return other[: len(one)] == one
