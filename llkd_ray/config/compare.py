"""Which ways of training are compared."""

from pydantic import Field, NonNegativeInt, model_validator

from llkd_ray.config.section import Name, Section, Text
from llkd_ray.config.selection import RuleName


class CompareSection(Section):
    """The comparison: rules and other variants, over several seeds, on one labels artifact."""

    rules: tuple[RuleName, ...] = ("llkd", "all", "random")
    """Rules, each at its defaults, but for the experiment's own."""
    variants: dict[Name, tuple[Text, ...]] = Field(default_factory=dict)
    """Further variants by name: overrides of the experiment, `section.key=value`."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Seeds of head, order and dropout; each variant is trained once with each."""
    match_random: bool = True
    """Let `random` keep as many rows in each epoch as `llkd` did with the same seed, where both are
    compared."""

    @model_validator(mode="after")
    def _each_once(self) -> "CompareSection":
        both = sorted(set(self.rules) & set(self.variants))
        if both:
            raise ValueError(f"{', '.join(both)}: named in rules and in variants; rename one")
        if not self.seeds or not (self.rules or self.variants):
            raise ValueError("give at least one seed, and one rule or variant")
        return self
