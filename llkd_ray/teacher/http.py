"""A teacher behind any OpenAI-compatible endpoint.

Nothing is known of its tokenizer: `prompt.max_text_tokens` counts words here, and labels are read
from the text of tokens (`spoken`). What stands in a text for the markup of a chat is up to the
endpoint; white space at least is collapsed before it is sent.

Shape legend: N texts, C classes.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llkd_ray.config import Example, HTTPTeacher, PromptSection, TaskSection
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.answers import CONTENT_FREE, Answer, Continuation
from llkd_ray.teacher.client import Client, TextError
from llkd_ray.teacher.reply import Reply
from llkd_ray.teacher.shots import choose_shots
from llkd_ray.teacher.spoken import FirstToken, count_votes, told_apart
from llkd_ray.teacher.wording import LETTERS, Wording

_log = logging.getLogger(__name__)

_TRIALS = 16  # Texts that show at most whether first tokens tell the labels apart.


@dataclass(frozen=True)
class _Reading:
    """How labels are asked for and read, the same for all rows."""

    wording: Wording
    votes: bool
    why: str


class Endpoint:
    """An endpoint with the prompt and the read-out of one task.

    Labels are read from the log-probabilities of the first token, by the labels' words or, where
    these begin alike, by lettered options. An endpoint that gives no log-probabilities is asked
    for several answers, which are counted as votes. Which of these it is follows from the
    settings and from how the endpoint answers the task's own examples, before the first text.
    """

    def __init__(
        self, task: TaskSection, teacher: HTTPTeacher, pool: Sequence[Example] = ()
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            task: Labels, examples and wording.
            teacher: Endpoint and prompt settings.
            pool: Gold examples that the prompt may show.

        Raises:
            TeacherError: No key, an address that is none, or a read-out that cannot be had over
                HTTP.
        """
        check_readout(task, teacher)
        self._task = task
        self._teacher = teacher
        self._client = Client(teacher)
        self._shots = choose_shots(task, teacher.shots, pool)
        self._examples = (*task.examples, *pool)
        self._reading: _Reading | None = None
        self._one_by_one = False
        """Whether it samples one answer to a request."""
        self._choosing = asyncio.Lock()

    async def read(self, texts: Sequence[str]) -> list[Answer]:
        """Return an answer for each of N texts; see `Teacher.read`.

        Raises:
            TeacherError: A wrong address, key or model, or a request that the endpoint never
                takes.
        """
        return await self._each(await self._choose(), texts)

    async def write(
        self, prompt: str, *, json_schema: Mapping[str, Any] | None = None, **sampling: Any
    ) -> Continuation:
        """Go on from a prompt, or answer it; see `Author.write`."""
        body: dict[str, Any] = {"model": self._teacher.model, **sampling}
        if json_schema is not None:
            format_ = {"name": "text", "schema": dict(json_schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": format_}
        if self._teacher.api == "chat":
            path, body["messages"] = "/chat/completions", [{"role": "user", "content": prompt}]
        else:
            path, body["prompt"] = "/completions", prompt
        try:
            reply = await self._client.ask(path, body)
        except TextError as error:
            return Continuation("", False, 0, 0, 0, str(error))
        return Continuation(
            text=reply.said[0],
            finished=reply.finished,
            tokens=reply.tokens,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    @property
    def way(self) -> str | None:
        """What is read, of which wording; None before the first text."""
        if self._reading is None:
            return None
        of = "letters" if self._reading.wording.offered else "words"
        return f"{'votes' if self._reading.votes else 'log-probabilities'} of {of}"

    async def _each(self, reading: _Reading, texts: Sequence[str]) -> list[Answer]:
        own = await asyncio.to_thread(self._shots.own, texts)
        asked = [
            asyncio.ensure_future(self._answer(reading, text, (*self._shots.shared, *shots)))
            for text, shots in zip(texts, own, strict=True)
        ]
        try:
            return await asyncio.gather(*asked)
        finally:
            for one in asked:  # What concerns all texts ends the others, too.
                one.cancel()

    async def _answer(self, reading: _Reading, text: str, shots: Sequence[Example]) -> Answer:
        kept, cut, error = fit(text, self._teacher.prompt)
        if error is not None:
            return Answer(None, 0, 0, cut, error)
        replies: list[Reply] = []
        try:
            if reading.votes:
                read = await self._vote(reading.wording, kept, shots, replies)
            else:
                replies.append(await self._likeliest(reading.wording, kept, shots))
                token = _first_token(replies[-1], reading.wording)
                read = (token.error or token.logprobs) if token else "no log-probabilities came"
        except TextError as failed:
            read = str(failed)
        return Answer(
            logprobs=None if isinstance(read, str) else read,
            prompt_tokens=sum(reply.prompt_tokens for reply in replies),
            cached_tokens=sum(reply.cached_tokens for reply in replies),
            cut_tokens=cut,
            error=read if isinstance(read, str) else None,
        )

    async def _choose(self) -> _Reading:
        """Choose the reading, once."""
        async with self._choosing:
            if self._reading is None:
                try:
                    self._reading = await self._try()
                except TextError as error:
                    raise TeacherError(
                        f"{self._teacher.url} does not answer now ({error}): run the job again "
                        "when it does"
                    ) from None
                _log.info("%s: %s", self._teacher.url, self._reading.why)
            return self._reading

    async def _try(self) -> _Reading:
        """Ask about texts of which each label should be the answer, and see how it can be read.

        Raises:
            TextError: The endpoint does not answer now.
            TeacherError: No label can be read from what it answers.
        """
        readout, num_classes = self._teacher.readout, len(self._task.labels)
        words, letters = Wording.in_words(self._task), Wording.in_letters(self._task)
        lettered = readout == "letters"
        if self._teacher.top_logprobs == 0:
            wording = letters if lettered else words
            return _Reading(wording, votes=True, why="votes: teacher.top_logprobs is 0")
        if not lettered and told_apart(words.answers):
            tokens = await self._trial(words)
            if not tokens and readout == "first_token":
                raise TeacherError(
                    f"{self._teacher.url} gives no log-probabilities, which teacher.readout = "
                    '"first_token" reads: set it to "auto", and answers are counted as votes'
                )
            if not tokens:
                return _Reading(words, votes=True, why="votes: it gives no log-probabilities")
            if all(token.is_clear for token in tokens):
                self._check_answers(tokens)
                return _Reading(words, votes=False, why="first_token: labels begin differently")
        if readout == "first_token":
            raise TeacherError(
                f"task.labels: the words of two labels begin alike for {self._teacher.model} at "
                f'{self._teacher.url}: give them other words, or set teacher.readout = "letters"'
            )
        if num_classes > len(LETTERS):
            why = f"votes: labels begin alike, and {num_classes} are too many for letters"
            return _Reading(words, votes=True, why=why)
        tokens = await self._trial(letters)
        if not tokens:
            wording = letters if lettered else words
            return _Reading(wording, votes=True, why="votes: it gives no log-probabilities")
        self._check_answers(tokens)
        why = "teacher.readout" if lettered else "labels begin alike"
        return _Reading(letters, votes=False, why=f"letters: {why}")

    def _check_answers(self, tokens: Sequence[FirstToken]) -> None:
        """Refuse an endpoint that answers most examples with no label, before all rows are paid."""
        strange = [token for token in tokens if not token.is_answer]
        if 2 * len(strange) > len(tokens):
            raise TeacherError(
                f"{self._teacher.model} at {self._teacher.url} answers {len(strange)} of "
                f"{len(tokens)} examples with no label, but with {strange[0].likeliest!r} first: "
                "have task.instruction ask for a label alone, turn off that it thinks aloud, or "
                "count its answers as votes with teacher.top_logprobs=0"
            )

    async def _trial(self, wording: Wording) -> list[FirstToken]:
        """Return what comes back about one example of each label, where there are any.

        Raises:
            TeacherError: The endpoint refuses all of them.
            TextError: One of them is not answered for now, which leaves it open how to read.
        """
        examples = {example.label: example.text for example in reversed(self._examples)}
        texts = [fit(text, self._teacher.prompt)[0] for text in examples.values()]
        texts = texts[:_TRIALS] or list(CONTENT_FREE)
        own = await asyncio.to_thread(self._shots.own, texts)
        replies = await asyncio.gather(
            *(
                self._likeliest(wording, text, (*self._shots.shared, *shots))
                for text, shots in zip(texts, own, strict=True)
            ),
            return_exceptions=True,
        )
        failed = [reply for reply in replies if isinstance(reply, BaseException)]
        for error in failed:
            if not (isinstance(error, TextError) and error.refused):
                raise error
        if len(failed) == len(replies):
            raise TeacherError(
                f"{self._teacher.url} refuses what it is asked ({failed[0]}): check the [teacher] "
                "section, first teacher.top_logprobs and teacher.api"
            )
        shared = [_first_token(reply, wording) for reply in replies if isinstance(reply, Reply)]
        return [token for token in shared if token is not None]

    async def _likeliest(self, wording: Wording, text: str, shots: Sequence[Example]) -> Reply:
        top = self._teacher.top_logprobs
        chat = self._teacher.api == "chat"
        asked = {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
        return await self._ask(wording, text, shots, max_tokens=1, temperature=0.0, **asked)

    async def _vote(
        self, wording: Wording, text: str, shots: Sequence[Example], replies: list[Reply]
    ) -> list[float] | str:
        """Sample answers until there are enough; what came back is added to `replies`."""
        votes = self._teacher.votes
        longest = max(len(answer.encode()) for answer in wording.answers)
        said: list[str] = []
        while len(said) < votes:  # An endpoint may send fewer than it was asked for.
            at_once = 1 if self._one_by_one else votes - len(said)
            try:
                reply = await self._sample(wording, text, shots, at_once, longest)
            except TextError as error:
                if not error.refused or at_once == 1:
                    raise
                # Some never take n above 1; a text that is refused is so once more.
                reply = await self._sample(wording, text, shots, 1, longest)
                self._one_by_one = True
            replies.append(reply)
            said += reply.said
        return count_votes(said[:votes], wording.answers, letters=wording.offered)

    async def _sample(
        self, wording: Wording, text: str, shots: Sequence[Example], votes: int, longest: int
    ) -> Reply:
        return await self._ask(
            wording,
            text,
            shots,
            n=votes,
            temperature=self._teacher.vote_temperature,
            max_tokens=longest // 2 + 4,  # A token is seldom less than two bytes of a word.
        )

    async def _ask(
        self, wording: Wording, text: str, shots: Sequence[Example], **decoding: Any
    ) -> Reply:
        """Send one request, again where that may help.

        Raises:
            TeacherError: No text can be answered.
            TextError: This text is not answered.
        """
        body: dict[str, Any] = {"model": self._teacher.model, **decoding}
        if self._teacher.api == "chat":
            path, body["messages"] = "/chat/completions", wording.messages(text, shots)
        else:
            path, body["prompt"] = "/completions", wording.prefix(shots) + wording.question(text)
        return await self._client.ask(path, body)


def fit(text: str, prompt: PromptSection) -> tuple[str, int, str | None]:
    """Cut a text to `max_text_tokens` words, there being no tokenizer.

    Returns:
        The text, how many words were left out, and why it is not to be read at all.
    """
    words, limit = text.split(), prompt.max_text_tokens
    if limit is None or len(words) <= limit:
        return text, 0, None
    cut = len(words) - limit
    match prompt.overlong:
        case "head":
            return " ".join(words[:limit]), cut, None
        case "head-tail":
            head = limit - limit // 2
            return " ".join(words[:head] + words[head + cut :]), cut, None
        case "reject":
            return "", 0, f"the text has {len(words)} words, {limit} are read at most"


def _first_token(reply: Reply, wording: Wording) -> FirstToken | None:
    """Share out a reply's first token, if its log-probabilities came along."""
    if not reply.top:
        return None
    return FirstToken.of(reply.top, wording.answers, letters=wording.offered)


def check_readout(task: TaskSection, teacher: HTTPTeacher) -> None:
    """Refuse what no endpoint can be read by.

    Raises:
        TeacherError: It takes what is not given over HTTP, or more letters than there are.
    """
    if teacher.readout == "trie":
        raise TeacherError(
            'teacher.readout = "trie" needs the log-probability of any token, which no endpoint '
            'gives over HTTP: set "auto", "letters" or "first_token"'
        )
    if teacher.readout == "letters" and len(task.labels) > len(LETTERS):
        raise TeacherError(
            f'teacher.readout = "letters": {len(task.labels)} labels are more than the '
            f'{len(LETTERS)} letters: set "auto"'
        )
