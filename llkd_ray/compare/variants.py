"""The variants of a comparison, as settings of the training loop."""

from dataclasses import dataclass

from llkd_ray.config import Experiment, RandomRule, rule_named, with_overrides


@dataclass(frozen=True)
class Variant:
    """One way of training."""

    name: str
    experiment: Experiment
    matched: bool
    """Whether it keeps as many rows as the variant `llkd`."""


def variants_of(experiment: Experiment) -> list[Variant]:
    """Return the variants, those that others are matched to first.

    Each is trained by one worker, in a process of its own: the steps are those of many workers.

    Raises:
        ConfigError: An override of a variant does not fit.
    """
    section = experiment.compare
    alone = with_overrides(experiment, ["train.num_workers=1", "train.zero_stage=0"])
    match = section.match_random and "llkd" in section.rules
    found = []
    for name in section.rules:
        rule = rule_named(name, alone.selection)
        chosen = alone.model_copy(update={"selection": rule})
        found.append(Variant(name, chosen, match and isinstance(rule, RandomRule)))
    for name, overrides in section.variants.items():
        found.append(Variant(name, with_overrides(alone, overrides), matched=False))
    return sorted(found, key=lambda variant: variant.matched)
