"""The prompt as token ids: what all rows share comes first, the row's own text last.

The engine caches the shared part in whole blocks, so it is computed once for the whole corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding

from llkd_ray.config import Example, PromptSection, TaskSection, VLLMTeacher
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.layout import Codec, Layout, Marks, Piece, Words, only_turn
from llkd_ray.teacher.shots import Shots, choose_shots
from llkd_ray.teacher.verbalizer import Readout, choose_readout
from llkd_ray.teacher.wording import Wording, one_line

__all__ = ["Encoded", "Prompt", "Wording"]

# Less than this of a text says nothing about it.
_MIN_TEXT_TOKENS = 8
# Of a longer text than so many characters for each token that is read, nothing more is looked at,
# so that a text of many megabytes does not take minutes. No language comes near it.
_MAX_CHARS_PER_TOKEN = 32
_ELLIPSIS = " ... "
# Fills the shared part up to a whole block. Plain words change a teacher's answers little; runs of
# newlines or of a special token, as one would fill with at first, cost SmolLM2 more than a tenth of
# its accuracy.
_FILLER = """\
The following is a list of texts, each of them with its label. Read every text with care, and \
then give the label that fits it best.

"""


@dataclass(frozen=True)
class Encoded:
    """A row's prompt."""

    ids: list[int]
    """Token ids; none where there is an error."""
    cut_tokens: int
    """Tokens of the text that were left out; an estimate for a text of more than 32 characters for
    each token that the teacher reads."""
    error: str | None = None
    """Why the teacher is not asked about this text."""


@dataclass(frozen=True)
class Prompt:
    """The prompt of one task for one tokenizer. Safe to use from several threads at once."""

    readout: Readout
    shared_ids: tuple[int, ...]
    """What the prompts of all rows begin with."""
    wording: Wording
    shots: Shots
    layout: Layout
    codec: Codec
    section: PromptSection
    max_tokens: int
    """Tokens that a prompt may take."""
    lead: str | None
    """Where a tokenizer does not begin a token at the space before a text, the words in front of
    it, which are then tokenized together with each text."""
    turn: tuple[Marks, Marks] | None
    """What stands around a turn by itself, of a chat."""

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        task: TaskSection,
        teacher: VLLMTeacher,
        pool: Sequence[Example] = (),
    ) -> "Prompt":
        """Build the prompt of a task.

        Args:
            tokenizer: The teacher's, from Hugging Face's `tokenizers`.
            task: What is asked.
            teacher: Read-out, format, examples, and what the engine takes.
            pool: Gold rows to choose examples from, besides the task's own.

        Raises:
            TeacherError: The labels cannot be read, the examples cannot be chosen, or the prompt
                leaves no room for a text.
        """
        codec = Codec(tokenizer)
        readout = choose_readout(tokenizer, task, teacher, codec)
        wording = Wording(task, readout.answers, offered=readout.kind == "letters")
        layout = Layout.of(tokenizer, wording, teacher.prompt.format)
        shots = choose_shots(task, teacher.shots, pool)
        shared = [*layout.opening, *_pieces(layout, wording, shots.shared)]
        probe = Words(f" text{layout.question_end}")
        lead = None
        if codec.following(shared, [probe]) != codec.ids([probe]):
            shared, lead = _without_last_words(shared)
        ids = codec.ids(shared)
        if teacher.prompt.format == "plain":
            # A chat template puts the first token itself where its model wants one.
            ids = [*codec.bos, *ids]
        if teacher.prompt.align and teacher.engine.block_size and lead is None:
            first = len(codec.bos)
            if teacher.prompt.format == "chat":
                first = len(codec.ids(layout.opening[:1]))
            ids = _align(ids, teacher.engine.block_size, first, codec)
        prompt = cls(
            readout=readout,
            shared_ids=tuple(ids),
            wording=wording,
            shots=shots,
            layout=layout,
            codec=codec,
            section=teacher.prompt,
            # The engine itself adds one token.
            max_tokens=teacher.engine.max_model_len
            - 1
            - max(len(branch.path) for branch in readout.branches),
            lead=lead,
            turn=only_turn(tokenizer) if teacher.prompt.format == "chat" else None,
        )
        prompt._check_room()
        return prompt

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the prompts of texts, a long text cut as `teacher.prompt.overlong` says."""
        lines = [_one_valid_line(text) for text in texts]
        befores = [self._before(own) for own in self.shots.own(lines)]
        looked_at = [self._looked_at(line) for line in lines]
        rows = self.codec.words(
            [self._row(lead, seen) for (_, lead), seen in zip(befores, looked_at, strict=True)]
        )
        return [self._fit(*of_row) for of_row in zip(lines, looked_at, befores, rows, strict=True)]

    def to_write(self, text: str) -> list[int]:
        """Return the ids of what the teacher goes on from: a text or, of a chat, a turn."""
        if self.turn is None:
            return [*self.codec.bos, *self.codec.ids([Words(text)])]
        first, reply = self.turn
        return self.codec.ids([first, Words(text), reply])

    def render(self, text: str) -> str:
        """Return what the teacher reads for a text, for people."""
        encoded = self.encode([text])[0]
        return encoded.error or self.codec.decode(encoded.ids)

    def _before(self, own: Sequence[Example]) -> tuple[list[int], str]:
        """Return what stands between the shared part and the space before a text."""
        pieces = _pieces(self.layout, self.wording, own)
        if self.lead is None:
            return self.codec.ids(pieces), ""
        rest, lead = _without_last_words([Words(self.lead), *pieces])
        return self.codec.ids(rest), lead

    def _row(self, lead: str, text: str) -> str:
        return f"{lead} {text}{self.layout.question_end}"

    def _room(self, around: int) -> int:
        """Return how many tokens a text may take beside those around it."""
        left = self.max_tokens - around
        return min(left, self.section.max_text_tokens or left)

    def _looked_at(self, line: str) -> str:
        """Leave out at once what cannot fit."""
        most = self._room(len(self.shared_ids)) * _MAX_CHARS_PER_TOKEN
        if len(line) <= most:
            return line
        if self.section.overlong == "head-tail":
            return _join(line[: most // 2], line[-(most // 2) :])
        return line[:most]

    def _fit(self, line: str, seen: str, before: tuple[list[int], str], row: Encoding) -> Encoded:
        """Put the parts together, the text cut to the room that they leave."""
        own, lead = before
        reply = self.codec.ids(self.layout.reply)
        spans = _spans(row, lead, seen)
        around = len(self.shared_ids) + len(own) + len(row.ids) - len(spans) + len(reply)
        room = self._room(around)
        tokens = kept = len(spans)
        if seen is not line:
            tokens = round(tokens * len(line) / len(seen))
        if self.section.overlong == "reject" and (tokens > room or seen is not line):
            about = "" if seen is line else "about "
            error = f"the text takes {about}{tokens} tokens, the teacher reads at most {room}"
            return Encoded([], tokens, error)
        if len(spans) > room:
            row, kept = self._cut(seen, spans, lead, room)
        return Encoded([*self.shared_ids, *own, *row.ids, *reply], tokens - kept)

    def _cut(
        self, text: str, spans: list[tuple[int, int]], lead: str, room: int
    ) -> tuple[Encoding, int]:
        """Return the row of a shorter text, and the tokens that this text takes."""
        keep = room
        while True:
            shorter = self._shorten(text, spans, keep)
            row = self.codec.words([self._row(lead, shorter)])[0]
            tokens = len(_spans(row, lead, shorter))
            if tokens <= room or keep == 0:
                return row, tokens
            # Joined anew the rest may take a token or two more: give way until it fits.
            keep = max(0, keep - (tokens - room))

    def _shorten(self, text: str, spans: list[tuple[int, int]], keep: int) -> str:
        tail = keep // 2 if self.section.overlong == "head-tail" else 0
        head = text[: spans[keep - tail - 1][1]] if keep > tail else ""
        return _join(head, text[spans[-tail][0] :]) if tail else one_line(head)

    def _check_room(self) -> None:
        own = sorted(
            len(self.codec.ids(_pieces(self.layout, self.wording, [shot])))
            for shot in self.shots.candidates
        )
        before, lead = self._before(())
        row = self.codec.words([self._row(lead, "")])[0]
        reply = self.codec.ids(self.layout.reply)
        around = len(self.shared_ids) + len(before) + len(row.ids) + len(reply)
        around += sum(own[len(own) - self.shots.own_count :])
        if self.max_tokens - around < _MIN_TEXT_TOKENS:
            raise TeacherError(
                f"the prompt takes {around} of {self.max_tokens} tokens before any text: give "
                "fewer task.examples (or lower teacher.shots), or raise "
                "teacher.engine.max_model_len"
            )


def _pieces(layout: Layout, wording: Wording, shots: Sequence[Example]) -> list[Piece]:
    """Return examples with their answers, up to where the next text begins."""
    return [
        piece
        for shot in shots
        for piece in layout.shot(_one_valid_line(shot.text), wording.answer(shot))
    ]


def _without_last_words(pieces: Sequence[Piece]) -> tuple[list[Piece], str]:
    """Split off the words after the last marks."""
    last = max((at for at, piece in enumerate(pieces) if isinstance(piece, Marks)), default=-1)
    return list(pieces[: last + 1]), "".join(piece.text for piece in pieces[last + 1 :])


def _align(ids: list[int], block_size: int, first: int, codec: Codec) -> list[int]:
    """Fill up to a whole number of blocks, behind the first tokens, which open text or turn."""
    missing = -len(ids) % block_size
    filler = codec.ids([Words(_FILLER)]) * block_size
    return [*ids[:first], *filler[len(filler) - missing :], *ids[first:]]


def _spans(row: Encoding, lead: str, text: str) -> list[tuple[int, int]]:
    """Return the characters of the text behind each of its tokens, start and end."""
    begin = len(lead) + 1
    end = begin + len(text)
    return [
        (max(start - begin, 0), min(stop - begin, len(text)))
        for start, stop in row.offsets
        if stop > begin and start < end
    ]


def _join(head: str, tail: str) -> str:
    return one_line(f"{head}{_ELLIPSIS}{tail}")


def _one_valid_line(text: str) -> str:
    """Make a text one line, and replace what no tokenizer takes: half of a surrogate pair."""
    return one_line(text).encode(errors="replace").decode()
