"""The prompt: what all rows share comes first, the row's own text last.

The engine caches the shared part in whole blocks, so it is computed once for the whole corpus.
"""

from dataclasses import dataclass
from typing import Any

from llkd_ray.config import TaskSection
from llkd_ray.errors import TeacherError


@dataclass(frozen=True)
class Prompt:
    """A few-shot prompt for one task."""

    prefix: str
    """Instruction and examples: the same for every row."""
    text_prefix: str
    label_prefix: str

    @classmethod
    def of(cls, task: TaskSection) -> "Prompt":
        """Build the prompt of a task."""
        words = label_words(task)
        paragraphs = [task.instruction.strip()] if task.instruction.strip() else []
        bare = cls("", task.text_prefix, task.label_prefix)
        paragraphs += [
            f"{bare.render(example.text)} {words[example.label]}" for example in task.examples
        ]
        prefix = "".join(paragraph + "\n\n" for paragraph in paragraphs)
        return cls(prefix, task.text_prefix, task.label_prefix)

    def render(self, text: str) -> str:
        """Return the prompt for a text.

        Runs of white space become one space, so that a text stays one line and cannot pass for
        another example or an answer of its own.
        """
        return f"{self.prefix}{self.text_prefix} {' '.join(text.split())}\n{self.label_prefix}"

    def token_ids(self, tokenizer: Any, text: str, max_tokens: int) -> list[int]:
        """Return the prompt as token ids, its text cut at the end to fit.

        Args:
            tokenizer: Of the teacher; it adds what special tokens the model wants.
            text: The row's text.
            max_tokens: What the engine takes, less the one token it answers.

        Raises:
            TeacherError: The prompt without any text does not fit.
        """
        ids: list[int] = tokenizer(self.render(text))["input_ids"]
        if len(ids) <= max_tokens:
            return ids
        around = len(tokenizer(self.render(""))["input_ids"])
        body = tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"]
        # Joined anew the pieces may take a token or two more than apart: give way until they fit.
        for room in range(max_tokens - around, 0, -1):
            ids = tokenizer(self.render(tokenizer.decode(body[:room])))["input_ids"]
            if len(ids) <= max_tokens:
                return ids
        raise TeacherError(
            f"the prompt takes {around} of {max_tokens} tokens before any text: give fewer "
            "task.examples or raise teacher.engine.max_model_len"
        )


def label_words(task: TaskSection) -> dict[str, str]:
    """Return what the teacher reads and writes for each label."""
    return {label.name: label.words or label.name for label in task.labels}
