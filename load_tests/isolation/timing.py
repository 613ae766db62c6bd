"""The timing audit: can a caller tell from its TTFT whether another has just sent the same prompt?

A round has a warm and a cold half, in random order. In each the victim sends a prompt, then the attacker and after it
the insider send theirs: in the warm half the victim's own, in the cold half others that nobody has sent. So both halves
do the same work before a probe, and what the attacker's probe follows is the same request in both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from load_tests.isolation.checks import Check
from load_tests.isolation.stats import ks_test
from load_tests.isolation.system import ATTACKER, INSIDER, VICTIM, System
from load_tests.isolation.texts import fresh_prompt

SAME_WARM, SAME_COLD = "same zone, warm", "same zone, cold"
CROSS_WARM, CROSS_COLD = "other tenant, victim has it", "other tenant, nobody has it"
ALPHA = 0.01  # a correct system is told apart this often, by chance
CONTROL_P = 1e-6
NUM_WARM_UP = 4

Samples = Mapping[str, Sequence[float]]


def measure(system: System, rng: random.Random, num_rounds: int) -> dict[str, list[float]]:
    """TTFT in seconds, `num_rounds` an arm, in the order they were taken."""
    samples: dict[str, list[float]] = {arm: [] for arm in (SAME_WARM, SAME_COLD, CROSS_WARM, CROSS_COLD)}
    for _ in range(NUM_WARM_UP):
        for caller in (VICTIM, ATTACKER, INSIDER):
            system.ask(caller, fresh_prompt(rng))
    for _ in range(num_rounds):
        for is_warm in rng.sample((True, False), 2):
            primed = fresh_prompt(rng)
            system.ask(VICTIM, primed)
            for caller, warm, cold in ((ATTACKER, CROSS_WARM, CROSS_COLD), (INSIDER, SAME_WARM, SAME_COLD)):
                ttft_s = system.ask(caller, primed if is_warm else fresh_prompt(rng))
                samples[warm if is_warm else cold].append(ttft_s)
    return samples


def judge(samples: Samples) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks."""
    same = ks_test(samples[SAME_WARM], samples[SAME_COLD])
    cross = ks_test(samples[CROSS_WARM], samples[CROSS_COLD])
    figures = {
        "samples_an_arm": len(samples[SAME_WARM]),
        "same_zone": {"ks_distance": same.distance, "ks_p": same.p},
        "cross_zone": {"ks_distance": cross.distance, "ks_p": cross.p},
    }
    return figures, [
        Check("warm and cold are told apart in one zone", same.p < CONTROL_P, _shown(same.distance, same.p),
              f"p < {CONTROL_P:g}", is_control=True),
        Check("what another tenant has sent is not told apart", cross.p >= ALPHA, _shown(cross.distance, cross.p),
              f"p >= {ALPHA:g}"),
    ]  # fmt: skip


def _shown(distance: float, p: float) -> str:
    return f"KS D {distance:.3f}, p {p:.3g}"
