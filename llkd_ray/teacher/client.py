"""Requests to an OpenAI-compatible endpoint: paced, sent again where that may help, judged.

What goes wrong is told apart here: it concerns one text, or all of them.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import openai
from pydantic import HttpUrl, TypeAdapter, ValidationError

from llkd_ray.config import HTTPTeacher
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.reply import Reply

_REASON_CHARS = 200


class TextError(Exception):
    """A text has no answer."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused
        """The endpoint will not take this request, however often it is sent."""


class Client:
    """Connections to one endpoint, with its key."""

    def __init__(self, teacher: HTTPTeacher) -> None:
        """Prepare to ask; nothing is sent yet.

        Raises:
            TeacherError: No key, or an address that is none.
        """
        _check_url(teacher.url)
        self._teacher = teacher
        self._key = _key(teacher.api_key_env)
        self._answered = False
        """Whether it has answered any request yet."""
        self._open = asyncio.Semaphore(teacher.max_concurrency)
        # The pace is kept below the client's retries, so that they count as requests, too.
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=teacher.url,
            timeout=teacher.timeout_s,
            max_retries=teacher.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"request": [_Pace(teacher.requests_per_minute).wait]}
            ),
        )

    async def ask(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Send one request; after 429, 5xx or a lost connection again, each time later.

        Args:
            path: Behind the base of the API, as `/completions`.
            body: Of the request, as JSON types.

        Raises:
            TeacherError: The address, the key or the model is wrong, or there is no more credit,
                or too often too many requests.
            TextError: This request is not answered.
        """
        try:
            async with self._open:
                reply = await self._client.post(path, body=body, cast_to=str)
            self._answered = True
            return Reply.model_validate_json(reply)
        # The causes go unmentioned: they hold the request, whose headers hold the key.
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIConnectionError as error:
            raise self._lost(error) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise TextError(
                self._line(f"the reply is not as the API has it: {first['msg']} at {where}")
            ) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        teacher, status = self._teacher, error.status_code
        reason = self._line(str(error))
        # A single text may be forbidden by a filter; a key that is refused was never taken.
        if status == 401 or (status == 403 and not self._answered):
            key = f"the key in ${teacher.api_key_env}" if self._key else "a request without a key"
            remedy = "check it" if self._key else "name the key's variable in teacher.api_key_env"
            return TeacherError(f"{teacher.url} refuses {key} ({reason}): {remedy}")
        if status in {402, 429}:
            wait = error.response.headers.get("retry-after")
            when = f"in {wait} s" if wait else "later"
            return TeacherError(
                f"{teacher.url} takes no more requests for now ({reason}): what it has answered is "
                f"kept; run the job again {when}, with a lower teacher.max_concurrency or "
                "teacher.requests_per_minute if they were too many at once"
            )
        if status == 404:
            return TeacherError(
                f"{teacher.url} has no model {teacher.model!r}, or is not the base of an API "
                f"({reason}): check teacher.model and teacher.url"
            )
        return TextError(reason, refused=status < 500 and status not in {408, 409, 429})

    def _lost(self, error: openai.APIConnectionError) -> Exception:
        cause = error.__cause__ or error
        reason = self._line(str(cause) or type(cause).__name__)
        # By name: which HTTP library stands below the client is its own affair, and has changed.
        if type(cause).__name__ in {"ConnectError", "ConnectTimeout"}:
            return TeacherError(
                f"{self._teacher.url} cannot be reached ({reason}): check teacher.url, and that "
                "its server is up"
            )
        if isinstance(error, openai.APITimeoutError):
            return TextError(f"no reply within {self._teacher.timeout_s:g} s")
        return TextError(f"the connection was lost: {reason}")

    def _line(self, said: str) -> str:
        """Make a short line of what a server said, without the key, which it may repeat."""
        line = " ".join(said.split()).encode(errors="replace").decode()  # No half characters.
        line = line.replace(self._key, "***") if self._key else line
        return line if len(line) <= _REASON_CHARS else line[:_REASON_CHARS] + "..."


class _Pace:
    """Requests spaced evenly over each minute."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._apart_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def wait(self, _request: object) -> None:
        """Wait for this request's turn."""
        if self._apart_s:
            now = asyncio.get_running_loop().time()
            turn = max(now, self._next)
            self._next = turn + self._apart_s
            await asyncio.sleep(turn - now)


def _check_url(url: str) -> None:
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError as error:
        raise TeacherError(
            f"teacher.url = {url!r} is no address ({error.errors()[0]['msg']}): give one like "
            "http://localhost:8000/v1"
        ) from error


def _key(variable: str | None) -> str | None:
    """Read the key from the environment; its value is told to nobody but the endpoint."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise TeacherError(
            f"teacher.api_key_env: the environment variable {variable} is not set where the "
            "teacher's actor runs"
        )
    if not (key.isascii() and key.isprintable()):
        raise TeacherError(
            f"teacher.api_key_env: the key in {variable} has characters that no HTTP header takes"
        )
    return key
