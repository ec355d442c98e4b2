"""The variants of a comparison, as settings of the training loop."""

from dataclasses import dataclass

from llkd_ray.config import Experiment, RandomRule, rule_named, with_overrides
from llkd_ray.lineage import Lineage


@dataclass(frozen=True)
class Variant:
    """One way of training."""

    name: str
    experiment: Experiment
    matched: bool
    """Whether it keeps as many rows as the variant `llkd`."""
    rows: Lineage
    """Whose labels it is trained on: its own where it changes how they are made."""


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
        matched = match and isinstance(rule, RandomRule)
        found.append(Variant(name, chosen, matched, Lineage(experiment)))
    for name, overrides in section.variants.items():
        chosen = with_overrides(alone, overrides)
        found.append(Variant(name, chosen, matched=False, rows=_rows(experiment, chosen)))
    return sorted(found, key=lambda variant: variant.matched)


def _rows(experiment: Experiment, variant: Experiment) -> Lineage:
    """Name the labels of a variant; lessons are those written for the experiment's own student."""
    train = experiment.train.model_copy(update={"lessons": variant.train.lessons})
    own = {"train": train, "student": experiment.student, "selection": experiment.selection}
    return Lineage(variant.model_copy(update={**own, "seed": experiment.seed}))
