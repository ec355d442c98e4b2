"""How many texts of each label the teacher writes in a round."""

import numpy as np

from llkd_ray.metrics import Floats, Ints


def share_out(samples: int, f1: Floats, weakness: float) -> Ints:
    """Share a round's texts out among the C labels.

    Args:
        samples: In all.
        f1: Of the student on each label [C].
        weakness: Share of the samples that goes to labels by what their F1 lacks, 0 to 1.

    Returns:
        Texts of each label [C]; they add up to `samples`.
    """
    even = np.full(len(f1), 1 / len(f1))
    lacking = 1 - f1
    by_weakness = lacking / lacking.sum() if lacking.sum() > 0 else even
    exact = samples * ((1 - weakness) * even + weakness * by_weakness)
    whole: Ints = np.floor(exact).astype(np.int64)
    # What rounding leaves over goes to the largest remainders, the first labels where they tie.
    largest = np.argsort(whole - exact, kind="stable")[: samples - int(whole.sum())]
    whole[largest] += 1
    return whole
