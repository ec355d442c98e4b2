"""Which token stands for which label."""

from typing import Any

from llkd_ray.config import TaskSection
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.prompt import label_words

# vLLM returns the log-probabilities of at most this many named tokens.
_MAX_TOKENS = 128


def label_token_ids(tokenizer: Any, task: TaskSection) -> list[int]:
    """Return the first token of each label's words [C], as it follows the prompt.

    The labels are read in one forward pass as the log-probabilities of these tokens, so they must
    differ.

    Raises:
        TeacherError: Two labels begin with the same token, or there are too many labels.
    """
    if len(task.labels) > _MAX_TOKENS:
        raise TeacherError(
            f"task.labels: {len(task.labels)} labels, the teacher reads at most {_MAX_TOKENS}"
        )
    before = tokenizer(task.label_prefix, add_special_tokens=False)["input_ids"]
    first: dict[int, str] = {}
    for name, words in label_words(task).items():
        ids = tokenizer(f"{task.label_prefix} {words}", add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before or len(ids) == len(before):
            raise TeacherError(
                f"task.labels: the teacher's tokenizer does not keep the words {words!r} apart "
                f"from task.label_prefix = {task.label_prefix!r}; change either"
            )
        token = ids[len(before)]
        if token in first:
            raise TeacherError(
                f"task.labels: the words of {first[token]!r} and {name!r} begin with the same "
                f"token {tokenizer.decode([token])!r}; give one of them other words"
            )
        first[token] = name
    return list(first)
