"""Where the texts of a prompt stand between the marks of its format, as token ids.

A prompt is a run of pieces. Marks are the format's own, and only in them does a special token
stand for itself; words come from people (instruction, examples, rows) and are only ever text:
a row that says `<|im_end|>` cannot end its turn.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer

from llkd_ray.errors import TeacherError
from llkd_ray.teacher.wording import Wording

# The date that every prompt is written on, where a chat template has one.
_DAY = date(2024, 7, 26)


@dataclass(frozen=True)
class Words:
    """Text of people, in which nothing is special."""

    text: str


@dataclass(frozen=True)
class Marks:
    """What the format itself puts in, special tokens among it."""

    text: str


Piece = Words | Marks


class Codec:
    """A tokenizer that takes words for words. Safe to use from several threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        """Copy a Hugging Face tokenizer, which itself changes state when it is called.

        Raises:
            TeacherError: It has no fast implementation, or takes words for special tokens.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TeacherError(
                f"teacher.model: its tokenizer is a {type(tokenizer).__name__} without a "
                "tokenizer.json; save one with save_pretrained of a fast tokenizer"
            )
        copy = backend.to_str()
        self._marks, self._words = Tokenizer.from_str(copy), Tokenizer.from_str(copy)
        for own in (self._marks, self._words):
            own.no_truncation()
            own.no_padding()
        added = backend.get_added_tokens_decoder()
        # Some models steer by tokens that they do not call special, such as <think>.
        self._words.add_special_tokens(
            [token for token in added.values() if not token.special and token.content.strip()]
        )
        self._words.encode_special_tokens = True
        self._decode = tokenizer.decode
        special = {id_: token.content for id_, token in added.items() if token.special}
        steering = special.keys() - {tokenizer.unk_token_id}
        names = list(special.values())
        for name, encoding in zip(names, self.words(names), strict=True):
            if steering.intersection(encoding.ids):
                raise TeacherError(
                    f"teacher.model: its tokenizer cannot take {name!r} for mere text, so a row "
                    "could change the prompt; choose a model with another tokenizer"
                )
        bare, full = (self._marks.encode("x", add_special_tokens=add).ids for add in (False, True))
        self.bos = tuple(full[: next(n for n in range(len(full)) if full[n:][: len(bare)] == bare)])
        """What the tokenizer itself puts before any text."""

    def words(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize words, in one batch; an encoding has `ids` and `offsets` in characters."""
        return list(self._words.encode_batch(list(texts), add_special_tokens=False))

    def ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Tokenize a run of pieces; neighbours of one kind as one text."""
        ids: list[int] = []
        for kind, run in itertools.groupby(pieces, type):
            tokenizer = self._words if kind is Words else self._marks
            joined = "".join(piece.text for piece in run)
            ids += tokenizer.encode(joined, add_special_tokens=False).ids
        return ids

    def following(self, before: Sequence[Piece], after: Sequence[Piece]) -> list[int] | None:
        """Return the ids of what comes after, as it follows what comes before.

        None where the tokenizer does not keep the two apart.
        """
        head, whole = self.ids(before), self.ids([*before, *after])
        return whole[len(head) :] if whole[: len(head)] == head else None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        return str(self._decode(list(ids)))


@dataclass(frozen=True)
class Layout:
    """What stands around the texts and the answers of a prompt.

    Tokenizers begin a token at a space, so the seam between what rows share and a row's own part
    lies right before the space in front of its text.
    """

    opening: tuple[Piece, ...]
    """Instruction and labels, up to where a text begins."""
    question_end: str
    """From the end of a text to the end of its question."""
    reply: tuple[Piece, ...]
    """From there to the teacher's answer."""
    shown_reply: tuple[Piece, ...]
    """From there to the answer of an example."""
    gap: str
    """In front of an answer's words."""
    between: tuple[Piece, ...]
    """From the end of an answer to where the next text begins."""

    @classmethod
    def of(cls, tokenizer: Any, wording: Wording, form: Literal["plain", "chat"]) -> "Layout":
        """Lay out a format.

        Raises:
            TeacherError: The tokenizer has no chat template, or one that cannot be used.
        """
        question_end = f"\n{wording.task.label_prefix}"
        start = Words(wording.task.text_prefix)
        if form == "plain":
            told = (Words(wording.prefix(())),)
            return cls((*told, start), question_end, (), (), " ", (Words("\n\n"), start))
        marks = _chat_marks(tokenizer, with_system=bool(wording.preamble))
        # A template that refuses a system turn has the first question open with what it would say.
        said = (Words(wording.preamble), marks.after_system or Words("\n\n"))
        return cls(
            opening=(marks.first, *(said if wording.preamble else ()), start),
            question_end=question_end,
            reply=(marks.reply,),
            shown_reply=(marks.shown_reply,),
            gap="",
            between=(marks.turn, start),
        )

    def shot(self, text: str, answer: str) -> tuple[Piece, ...]:
        """Return an example with its answer, up to where the next text begins."""
        question = Words(f" {text}{self.question_end}")
        return (question, *self.shown_reply, Words(self.gap + answer), *self.between)


def only_turn(tokenizer: Any) -> tuple[Marks, Marks]:
    """Return what stands before and after the words of a chat of one turn, up to its answer.

    Raises:
        TeacherError: The tokenizer has no chat template, or one that cannot be used.
    """
    marks = _chat_marks(tokenizer, with_system=False)
    return marks.first, marks.reply


@dataclass(frozen=True)
class _ChatMarks:
    """What a chat template puts in."""

    first: Marks
    after_system: Marks | None
    shown_reply: Marks
    turn: Marks
    reply: Marks


def _chat_marks(tokenizer: Any, *, with_system: bool) -> _ChatMarks:
    """Render a chat template around stand-ins and see what it puts between them."""
    if not getattr(tokenizer, "chat_template", None):
        raise TeacherError(
            "teacher.prompt.format = 'chat': the teacher's tokenizer has no chat template, as is "
            "usual of a base model; use teacher.prompt.format = 'plain'"
        )
    roles = [*(["system"] if with_system else []), "user", "assistant", "user"]
    chat = [{"role": role, "content": f"stand-in-{n}"} for n, role in enumerate(roles)]
    try:
        # Where a model can think aloud before it answers, it is told to answer at once.
        rendered: str = tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            # Some print today's date: rows asked about tomorrow would be asked in another way.
            strftime_now=_DAY.strftime,
        )
    except TemplateError as error:
        if with_system:
            return _chat_marks(tokenizer, with_system=False)
        raise TeacherError(
            f"teacher.prompt.format = 'chat': the teacher's chat template fails: {error}; use "
            "teacher.prompt.format = 'plain'"
        ) from error
    marks = []
    for turn in chat:
        before, found, rendered = rendered.partition(turn["content"])
        if not found:
            raise TeacherError(
                "teacher.prompt.format = 'chat': the teacher's chat template leaves out a "
                f"{turn['role']} turn or moves it; use teacher.prompt.format = 'plain'"
            )
        marks.append(Marks(before))
    first, *system, shown_reply, between = marks
    return _ChatMarks(first, system[0] if system else None, shown_reply, between, Marks(rendered))
