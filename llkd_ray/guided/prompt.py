"""What the teacher is given to write on: the report, and rows of a label to go on from.

A prompt is text to be completed, so that a small base model can do it: it ends where the next text
of the label would begin. In a chat it ends with what is asked for. What prompts share comes first.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llkd_ray.config import Label, SamplingSection, TaskSection, TextForm
from llkd_ray.errors import TeacherError
from llkd_ray.guided.shown import Shown
from llkd_ray.teacher.wording import one_line

_STOP = "\n"
_KEY = "text"
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {_KEY: {"type": "string", "minLength": 1}},
    "required": [_KEY],
    "additionalProperties": False,
}
_QUOTATION_MARKS = ('""', "\u201c\u201d", "\u00ab\u00bb", "''")


def writing_prompt(
    task: TaskSection,
    label: Label,
    report: str,
    shown: Shown,
    *,
    chat: bool,
    form: TextForm,
    room: int,
    count: Callable[[str], int],
) -> str:
    """Return the prompt after which the teacher writes a text of a label.

    Args:
        task: In the words that the teacher reads.
        label: To write about.
        report: The validation report; none when empty.
        shown: Gold rows of the label.
        chat: Whether the teacher answers, or completes.
        form: In which a text is written, `guide.sampling.form`.
        room: Tokens that the prompt may take; rows are left out to fit, the correct ones first.
        count: Returns the tokens of a text.

    Raises:
        TeacherError: It does not fit without any row.
    """
    while True:
        text = _written(task, label, report, shown, chat=chat, form=form)
        if count(text) <= room:
            return text
        if not len(shown):
            raise TeacherError(
                f"the prompt for the label {label.name!r} takes {count(text)} of {room} tokens "
                "before any row: raise teacher.engine.max_model_len, or lower guide.report_tokens "
                "or guide.sampling.max_tokens"
            )
        shown = _one_less(shown)


def decoding(sampling: SamplingSection) -> dict[str, Any]:
    """Return how a teacher is to draw a text, for `Author.write`; the seed is not among it."""
    drawn = sampling.model_dump(exclude={"form"})
    return drawn | ({"json_schema": _SCHEMA} if sampling.form == "json" else {"stop": [_STOP]})


def text_in(said: str, task: TaskSection, form: TextForm) -> str:
    """Return the text in what a teacher has written, empty where there is none.

    Args:
        said: By the teacher.
        task: Names the prefix of texts.
        form: In which it was to write, `guide.sampling.form`.
    """
    if form == "line":
        return _whole(bare(said, task))
    try:
        text = json.loads(said)[_KEY].strip()
    # No JSON, no object, no such key, no text: an endpoint that does not know the form.
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""
    return _whole(text)


def _whole(text: str) -> str:
    """Leave out halves of characters: JSON can write them, an endpoint's answer too."""
    return "".join(sign for sign in text if not "\ud800" <= sign <= "\udfff")


def bare(said: str, task: TaskSection) -> str:
    """Return a text without what a teacher puts around it: the prefix of texts, quotation marks."""
    text = said.strip().removeprefix(task.text_prefix).strip()
    if len(text) > 1 and text[0] + text[-1] in _QUOTATION_MARKS:
        return text[1:-1].strip()
    return text


def _written(
    task: TaskSection, label: Label, report: str, shown: Shown, *, chat: bool, form: TextForm
) -> str:
    words = one_line(label.words or label.name)
    described = f" ({one_line(label.description)})" if label.description else ""
    kind = f'the kind "{words}"'
    in_json = form == "json"
    how = f'as a JSON object like {{"{_KEY}": "..."}}' if in_json else "in one line"
    asked = (
        f"Write one more text of {kind}{described}, {how} and with nothing else."
        if chat
        else f"Here are more texts of {kind}{described}, each {how}.\n"
        f"{'' if in_json else task.text_prefix}"
    )

    def rows(title: str, texts: tuple[str, ...]) -> str:
        lines = [
            json.dumps({_KEY: text}, ensure_ascii=False)
            if in_json
            else f"{task.text_prefix} {one_line(text)}"
            for text in texts
        ]
        return "\n".join([title, *lines]) if lines else ""

    sections = [
        task.instruction.strip(),
        report,
        rows(f"Texts of {kind}{described}:", shown.correct),
        rows(f"Texts of {kind} that are often mistaken:", shown.wrong),
        rows(f"Texts of {kind} that nearly everybody mistakes:", shown.hard),
        asked,
    ]
    return "\n\n".join(section for section in sections if section)


def _one_less(shown: Shown) -> Shown:
    if shown.correct:
        return replace(shown, correct=shown.correct[1:])
    if shown.wrong:
        return replace(shown, wrong=shown.wrong[1:])
    return replace(shown, hard=shown.hard[:-1])
