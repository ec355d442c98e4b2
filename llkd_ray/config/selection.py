"""Which rows the student trains on: one class of settings per rule."""

import difflib
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt

from llkd_ray.config.section import Fraction, Section

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Lambda of a moving average: 0 follows the last value at once."""
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Weight = Literal["product", "sum", "confidence", "uncertainty", "one"]
"""Weight of a kept row in the loss, from the teacher's confidence and the student's uncertainty."""


class LLKDRule(Section):
    """Keep rows where the teacher is confident and the student uncertain (arXiv 2411.08028)."""

    rule: Literal["llkd"] = "llkd"
    teacher_decay: Decay = 0.9
    """Lambda of the teacher's moving thresholds. From epoch to epoch its signals are the same, so
    this changes something with `cadence = "step"` alone."""
    student_decay: Decay = 0.0
    """Lambda of the student's moving thresholds: 0 follows the student at once."""
    class_term: Literal["within_class", "mean_probability"] = "within_class"
    """What scales a class's threshold: the mean signal of the rows with this label, or the mean
    probability of the class over all rows, as FreeMatch has it."""
    cadence: Literal["epoch", "step"] = "epoch"
    """When thresholds move: before each epoch, from a scoring pass over all rows, or in each step,
    from the rows of its batch, as in the paper. A decay near 1 suits steps."""
    weight: Weight = "product"


class AllRule(Section):
    """Keep every row, at weight one: plain pseudo-labelling, the baseline."""

    rule: Literal["all"] = "all"


class RandomRule(Section):
    """Keep rows drawn anew each epoch, at weight one."""

    rule: Literal["random"] = "random"
    fraction: Share = 0.25
    """Share of the rows to keep."""
    kept: tuple[NonNegativeInt, ...] = ()
    """Rows to keep in each epoch, instead of a fraction: as many as another run kept. The last
    number stands for later epochs."""


class TeacherOnlyRule(Section):
    """Keep rows where the teacher is confident: llkd without the student."""

    rule: Literal["teacher-only"] = "teacher-only"
    weight: Literal["confidence", "one"] = "confidence"


class StudentOnlyRule(Section):
    """Keep rows where the student is uncertain: llkd without the teacher."""

    rule: Literal["student-only"] = "student-only"
    student_decay: Decay = 0.0
    weight: Literal["uncertainty", "one"] = "uncertainty"


class FixedRule(Section):
    """Keep rows by two thresholds that never move."""

    rule: Literal["fixed"] = "fixed"
    teacher_threshold: Fraction = 0.7
    student_threshold: Fraction = 0.5
    weight: Weight = "product"


class TopFractionRule(Section):
    """Keep a fixed share of each class: the rows with the highest score."""

    rule: Literal["top-fraction"] = "top-fraction"
    fraction: Share = 0.25
    by: Literal["product", "confidence", "uncertainty", "agreement"] = "product"
    """The score: the teacher's confidence, the student's uncertainty, their product, or the
    agreement of both on the label (see the rule `joint`)."""
    weight: Weight = "product"


class FreeMatchRule(Section):
    """Keep rows where the student is confident, by self-adaptive thresholds (arXiv 2205.07246)."""

    rule: Literal["freematch"] = "freematch"
    decay: Decay = 0.9


class FlexMatchRule(Section):
    """Keep rows where the student is confident, by curriculum thresholds (arXiv 2110.08263)."""

    rule: Literal["flexmatch"] = "flexmatch"
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """Of a class that the student has learned as well as its best one."""


class ConfidentLearningRule(Section):
    """Drop the labels that the student holds for mistaken (confident learning, arXiv 1911.00068).

    The first epoch keeps every row: the student knows nothing yet.
    """

    rule: Literal["confident-learning"] = "confident-learning"


class JointRule(Section):
    """Keep rows on whose label teacher and student agree; ours.

    The first epoch keeps rows by the teacher's confidence alone.
    """

    rule: Literal["joint"] = "joint"
    decay: Decay = 0.0
    """Lambda of the moving thresholds."""
    fraction: Share | None = None
    """Share of each class to keep at most, those with the highest agreement."""
    weight: Weight = "one"


class GoldRule(Section):
    """Train on the human's labels where there are any: what is left to win, never a product."""

    rule: Literal["gold"] = "gold"


Rule = (
    LLKDRule
    | AllRule
    | RandomRule
    | TeacherOnlyRule
    | StudentOnlyRule
    | FixedRule
    | TopFractionRule
    | FreeMatchRule
    | FlexMatchRule
    | ConfidentLearningRule
    | JointRule
    | GoldRule
)
SelectionSection = Annotated[Rule, Field(discriminator="rule")]
RULES: dict[str, type[Rule]] = {
    option.model_fields["rule"].default: option
    for option in (
        LLKDRule,
        AllRule,
        RandomRule,
        TeacherOnlyRule,
        StudentOnlyRule,
        FixedRule,
        TopFractionRule,
        FreeMatchRule,
        FlexMatchRule,
        ConfidentLearningRule,
        JointRule,
        GoldRule,
    )
}


def _known(rule: str) -> str:
    if rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RULES)}"
        raise ValueError(f"no rule {rule!r}; {hint}")
    return rule


RuleName = Annotated[str, AfterValidator(_known)]


def rule_named(rule: str, own: Rule) -> Rule:
    """Return the experiment's own rule if it has this name, else that rule at its defaults."""
    return own if own.rule == rule else RULES[rule]()
