"""The task and its texts."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from llkd_ray.config.section import Fraction, Location, Section, Text


class Label(Section):
    """One class of the task."""

    name: Text
    """The class, as it stands in every artifact and answer."""
    words: Text | None = None
    """What the teacher reads and writes for it; the name when not given."""
    description: Text | None = None
    """What belongs to it, in a line that the teacher reads."""
    gold: tuple[Text, ...] = ()
    """Values of the gold column that mean this class; the name when not given."""


class Example(Section):
    """A gold row shown to the teacher, and to nobody else: it is left out of the corpus."""

    text: Text
    label: Text


class TaskSection(Section):
    """What is to be told apart, in the words that the teacher reads."""

    instruction: str = ""
    """The first lines of the prompt."""
    text_prefix: str = "Text:"
    """Stands in front of a row's text."""
    label_prefix: str = "Label:"
    """Stands in front of the teacher's answer."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    """The classes, in the order of every probability vector."""
    examples: tuple[Example, ...] = ()
    """Few-shot examples, in the order in which the teacher reads them."""
    examples_source: Location | None = None
    """More gold rows that the teacher may be shown: as corpus.source, with the same columns. They
    are left out of the corpus."""
    max_examples: PositiveInt = 1000
    """Rows taken from examples_source, the first by row_id."""

    @model_validator(mode="after")
    def _labels_are_told_apart(self) -> "TaskSection":
        names = [label.name for label in self.labels]
        said, gold_of = dict[str, str](), dict[str, str]()
        for label in self.labels:
            if names.count(label.name) > 1:
                raise ValueError(f"the label {label.name!r} stands twice in task.labels")
            words = " ".join((label.words or label.name).split())
            if not words:
                raise ValueError(f"the words of the label {label.name!r} are blank")
            if words in said:
                raise ValueError(
                    f"the labels {said[words]!r} and {label.name!r} have the same words {words!r}; "
                    "give one of them other words"
                )
            said[words] = label.name
            for value in label.gold or (label.name,):
                if gold_of.setdefault(value, label.name) != label.name:
                    raise ValueError(
                        f"the labels {gold_of[value]!r} and {label.name!r} both have {value!r} in "
                        "the gold column; take it from one of them"
                    )
        for example in self.examples:
            if example.label not in names:
                raise ValueError(
                    f"the example {example.text[:40]!r} has the label {example.label!r}, which is "
                    f"not among task.labels ({', '.join(names)})"
                )
        return self

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the C classes, in the order of every probability vector."""
        return tuple(label.name for label in self.labels)


class CorpusSection(Section):
    """Where the texts come from and how they are split."""

    source: Location
    """`trec` (built in), or a Parquet, CSV or JSONL file, folder or URI."""
    text_column: Text = "text"
    gold_column: Text | None = None
    """Column with the human's label. Without it nothing can be validated or tested."""
    validation_fraction: Fraction = 0.1
    """Share of the distinct texts held out to choose the epoch (only where there is gold)."""
    test_fraction: Fraction = 0.1
    """Share of the distinct texts held out to score the models (only where there is gold)."""
    shard_rows: PositiveInt = 10_000
    """Rows in one Parquet shard."""
    max_text_chars: PositiveInt = 20_000
    """A longer text is kept aside."""
    max_rejected_fraction: Fraction = 0.1
    """The job stops when a larger share of the rows is kept aside."""
    skip_unreadable_files: bool = False
    """Go on without a file that cannot be read; it is named in rejected.parquet."""
