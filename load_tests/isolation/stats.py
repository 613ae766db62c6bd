"""The statistics of the audit. Pure: samples in, figures out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, slots=True)
class KsTest:
    """Two-sample Kolmogorov-Smirnov, two-sided. `distance`: the greatest between the two ECDFs."""

    distance: float
    p: float


def ks_test(a: Sequence[float], b: Sequence[float]) -> KsTest:
    """
    Raises:
        ValueError: A sample is empty.
    """
    with warnings.catch_warnings():
        # At a distance of one step scipy's exact count gives up; the asymptotic p that it takes instead is near 1.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation unsuccessful", category=RuntimeWarning)
        found = stats.ks_2samp(a, b)
    return KsTest(float(found.statistic), float(found.pvalue))


def auc_of_lower(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The chance that a positive lies below a negative, ties counted by half: the area under the ROC curve of the
    decision "low means positive".

    Raises:
        ValueError: A sample is empty.
    """
    if not positives or not negatives:
        raise ValueError("an area needs samples of both kinds")
    pairs_above = stats.mannwhitneyu(negatives, positives, method="asymptotic").statistic
    return float(pairs_above) / (len(positives) * len(negatives))


def auc_standard_error(num_positives: int, num_negatives: int) -> float:
    """Of the area of two independent samples of one distribution: what chance alone does to 0.5."""
    return math.sqrt((num_positives + num_negatives + 1) / (12 * num_positives * num_negatives))


def chance_outside(half_width: float, standard_error: float) -> float:
    """How often a normal figure with this standard error lies further than `half_width` from its mean."""
    return float(2 * stats.norm.sf(half_width / standard_error))


def p_of_at_least(successes: int, trials: int, chance: float) -> float:
    """How often guessing reaches `successes` of `trials`, one-sided binomial."""
    return float(stats.binomtest(successes, trials, chance, alternative="greater").pvalue)
