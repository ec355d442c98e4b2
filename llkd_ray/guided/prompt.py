"""What the teacher is given to write on: the report, and rows of a label to go on from.

A prompt is text to be completed, so that a small base model can do it: it ends where the next text
of the label would begin. In a chat it ends with what is asked for. What prompts share comes first.
"""

from collections.abc import Callable
from dataclasses import replace

from llkd_ray.config import Label, TaskSection
from llkd_ray.errors import TeacherError
from llkd_ray.guided.shown import Shown
from llkd_ray.teacher.wording import one_line

STOP = "\n"
"""A text is one line."""
_QUOTATION_MARKS = ('""', "\u201c\u201d", "\u00ab\u00bb", "''")


def writing_prompt(
    task: TaskSection,
    label: Label,
    report: str,
    shown: Shown,
    *,
    chat: bool,
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
        room: Tokens that the prompt may take; rows are left out to fit, the correct ones first.
        count: Returns the tokens of a text.

    Raises:
        TeacherError: It does not fit without any row.
    """
    while True:
        text = _written(task, label, report, shown, chat=chat)
        if count(text) <= room:
            return text
        if not len(shown):
            raise TeacherError(
                f"the prompt for the label {label.name!r} takes {count(text)} of {room} tokens "
                "before any row: raise teacher.engine.max_model_len, or lower guide.report_tokens "
                "or guide.sampling.max_tokens"
            )
        shown = _one_less(shown)


def bare(said: str, task: TaskSection) -> str:
    """Return a text without what a teacher puts around it: the prefix of texts, quotation marks."""
    text = said.strip().removeprefix(task.text_prefix).strip()
    if len(text) > 1 and text[0] + text[-1] in _QUOTATION_MARKS:
        return text[1:-1].strip()
    return text


def _written(task: TaskSection, label: Label, report: str, shown: Shown, *, chat: bool) -> str:
    words = one_line(label.words or label.name)
    described = f" ({one_line(label.description)})" if label.description else ""
    asked = (
        f'Write one more text of the kind "{words}"{described}, in one line and with nothing else.'
        if chat
        else f'Here are more texts of the kind "{words}"{described}, each in one line.\n'
        f"{task.text_prefix}"
    )
    sections = [
        task.instruction.strip(),
        report,
        *_rows(task, f'Texts of the kind "{words}"{described}:', shown.correct),
        *_rows(task, f'Texts of the kind "{words}" that are often mistaken:', shown.wrong),
        *_rows(task, f'Texts of the kind "{words}" that nearly everybody mistakes:', shown.hard),
        asked,
    ]
    return "\n\n".join(section for section in sections if section)


def _rows(task: TaskSection, title: str, texts: tuple[str, ...]) -> list[str]:
    lines = [f"{task.text_prefix} {one_line(text)}" for text in texts]
    return ["\n".join([title, *lines])] if lines else []


def _one_less(shown: Shown) -> Shown:
    if shown.correct:
        return replace(shown, correct=shown.correct[1:])
    if shown.wrong:
        return replace(shown, wrong=shown.wrong[1:])
    return replace(shown, hard=shown.hard[:-1])
