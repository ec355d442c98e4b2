"""The guided distillation: the teacher writes rows for what the student gets wrong."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from llkd_ray.config.section import Fraction, OpenFraction, Section
from llkd_ray.config.selection import RuleName

TextForm = Literal["line", "json"]


class ShownSection(Section):
    """Which gold rows of a label the teacher is shown before it writes more of them."""

    correct: NonNegativeInt = 4
    """Rows that the student gets right; more of them where there are too few of the others."""
    wrong: NonNegativeInt = 2
    """Rows that it gets wrong without being sure."""
    hard: NonNegativeInt = 2
    """Hard negatives: rows that it gets wrong with high confidence."""
    hard_of_label: PositiveInt | OpenFraction = 0.5
    """Which rows of a label are hard negatives: so many of those that the student gets wrong, or
    such a share of them, by its confidence in the wrong label."""


class SamplingSection(Section):
    """How the teacher's texts are drawn."""

    form: TextForm = "line"
    """line: a text is a line, which any model can write. json: a text is a JSON object that the
    engine holds the model to (structured output), so that it may have several lines and nothing
    stands around it; an endpoint behind HTTP must know `response_format`."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    max_tokens: PositiveInt = 64
    """Of one text; one that has not come to an end by then is dropped."""


class ChecksSection(Section):
    """What a generated row must pass before a student sees it.

    That it has a text, and that this is no text of the seed, the validation or the test split, is
    always checked.
    """

    length: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.5)
    """Words of a text: at least this often the shortest seed row's, at most this often the
    longest's."""
    noise: bool = True
    """Drop texts with characters foreign to the seed, words repeated over and over, or parts of
    the prompt."""
    near: OpenFraction = 0.9
    """Texts that are this much alike, by edits of characters, are near duplicates. A text that
    differs from a validation or test text in one word, and not in all, is always one; of scripts
    without spaces, such as Han, in one sign."""
    min_confidence: Fraction = 0.5
    """The teacher itself, asked for the label of its text, must give the one that it was asked to
    write, with at least this confidence; 0 does not ask for agreement."""
    min_uncertainty: Fraction = 0.05
    """Where the student gives the label that was asked for, it must be at least this uncertain, or
    there is nothing to learn."""
    student_agrees: bool = False
    """The student must give the label that was asked for, too: for a teacher that is weaker than
    the student, and is wrong where they differ."""


class GuideSection(Section):
    """Rounds of: see what the student gets wrong, have the teacher write more of it, train again.

    Source: PGKD, arXiv 2411.05045.
    """

    start: Literal["seed", "student"] = "seed"
    """Round 0. seed: a student trained on the seed alone. student: the one that jobs/train.py makes
    of the teacher's labels (`selection.rule`), which all further rounds train on, too; what of the
    seed is not trained on is then the first of the validation split, since that student has seen
    the unlabeled one."""
    seed_rows: Annotated[int, Field(ge=10)] = 1000
    """Gold rows to start from: task.examples, then the first of the unlabeled split, by row_id."""
    validation_fraction: OpenFraction = 0.2
    """Share of the seed that is not trained on: it gives the report, and chooses the round."""
    rounds: PositiveInt = 5
    patience: PositiveInt = 2
    """Stop after so many rounds in a row without a lower validation loss."""
    samples: PositiveInt = 256
    """Texts that the teacher writes in each round."""
    samples_per_prompt: PositiveInt = 16
    """Texts that are drawn after one prompt, which is computed once; the next prompt of the label
    shows other rows."""
    weakness: Fraction = 0.5
    """Share of the texts that goes to labels by what their F1 lacks; the others are spread evenly.
    """
    report_tokens: NonNegativeInt = 200
    """Tokens of the validation report in the prompt, words for `teacher.kind` http; 0 leaves it
    out."""
    weights: Literal["fresh", "last"] = "fresh"
    """What a round's training starts from. fresh: the encoder, so that a student does not depend on
    the order of what it saw. last: the student of the round before, as in the paper."""
    rule: RuleName = "all"
    """How rows are selected in training, as `selection.rule`; seed rows have confidence 1."""
    shown: ShownSection = ShownSection()
    sampling: SamplingSection = SamplingSection()
    checks: ChecksSection = ChecksSection()

    @validator(mode="after")
    def _both_parts_of_the_seed_have_rows(self) -> "GuideSection":
        if not 0 < self.validation_rows < self.seed_rows:
            raise ValueError(
                f"seed_rows = {self.seed_rows} with validation_fraction = "
                f"{self.validation_fraction} leaves no row to train or none to validate"
            )
        return self

    @property
    def validation_rows(self) -> int:
        """Return how many rows of the seed are validated on."""
        return round(self.seed_rows * self.validation_fraction)
