"""The attack: a search for the member id in a victim's prompt, all of which is known but for the id.

The victim sends a record with one of `NUM_CANDIDATES` ids. The attacker, and as a control the insider with the same
case, send the record with candidates in random order and believe the one whose first token came soonest. For the area
under the ROC curve each victim gives the right id and one wrong one; a part of the victims is searched to the end,
which gives the share of ids that are recovered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from load_tests.isolation.checks import Check
from load_tests.isolation.stats import auc_of_lower, auc_standard_error, chance_outside, p_of_at_least
from load_tests.isolation.system import ATTACKER, INSIDER, VICTIM, System
from load_tests.isolation.texts import member_ids, record_of

NUM_CANDIDATES = 8
SEARCHED_SHARE = 0.24  # of the victims, to the end
AUC_BAND = (0.45, 0.55)
CONTROL_AUC = 0.9
ALPHA = 0.01
CONTROL_P = 1e-6
NUM_WARM_UP = 4
SEARCHERS = {"same_zone": INSIDER, "cross_zone": ATTACKER}


@dataclass(frozen=True, slots=True)
class Search:
    """TTFT in seconds of what one searcher tried against one victim: the right id, a wrong one, further wrong ones."""

    right_s: float
    wrong_s: float
    further_s: tuple[float, ...] = ()

    @property
    def is_whole(self) -> bool:
        return len(self.further_s) == NUM_CANDIDATES - 2

    @property
    def has_recovered(self) -> bool:
        return self.right_s < min(self.wrong_s, *self.further_s)


def measure(system: System, rng: random.Random, num_victims: int) -> dict[str, list[Search]]:
    """Searches by `SEARCHERS`, one a victim, in the order of the victims."""
    searches: dict[str, list[Search]] = {condition: [] for condition in SEARCHERS}
    for _ in range(NUM_WARM_UP):  # the known text before the id is in everybody's own zone from here on
        for caller in (VICTIM, *SEARCHERS.values()):
            system.ask(caller, record_of(*member_ids(rng, 1)))
    searched = set(rng.sample(range(num_victims), max(1, round(SEARCHED_SHARE * num_victims))))
    for victim in range(num_victims):
        secret, *others = member_ids(rng, 1 + len(SEARCHERS) * (NUM_CANDIDATES - 1))
        system.ask(VICTIM, record_of(secret))
        for condition in rng.sample(list(SEARCHERS), len(SEARCHERS)):
            wrong, others = others[: NUM_CANDIDATES - 1], others[NUM_CANDIDATES - 1 :]  # no searcher tries another's
            candidates = [secret, *wrong]
            tried = range(NUM_CANDIDATES if victim in searched else 2)
            ttft_s = {
                index: system.ask(SEARCHERS[condition], record_of(candidates[index]))
                for index in rng.sample(tried, len(tried))
            }
            searches[condition].append(Search(ttft_s[0], ttft_s[1], tuple(ttft_s[index] for index in tried[2:])))
    return searches


def figures_of(searches: Sequence[Search]) -> dict[str, Any]:
    whole = [search for search in searches if search.is_whole]
    num_recovered = sum(search.has_recovered for search in whole)
    return {
        "auc": auc_of_lower([search.right_s for search in searches], [search.wrong_s for search in searches]),
        "samples_an_arm": len(searches),
        "searched": len(whole),
        "recovered": num_recovered,
        "recovery_rate": num_recovered / len(whole),
        "recovery_chance": 1 / NUM_CANDIDATES,
        "recovery_p": p_of_at_least(num_recovered, len(whole), 1 / NUM_CANDIDATES),
    }


def judge(searches: dict[str, list[Search]]) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks."""
    same, cross = (figures_of(searches[condition]) for condition in ("same_zone", "cross_zone"))
    error = auc_standard_error(cross["samples_an_arm"], cross["samples_an_arm"])
    low, high = AUC_BAND
    figures = {
        "candidates": NUM_CANDIDATES,
        "auc_standard_error": error,
        "chance_outside_band": chance_outside((high - low) / 2, error),
        "same_zone": same,
        "cross_zone": cross,
    }
    return figures, [
        Check("ids of one's own case are ranked first", same["auc"] > CONTROL_AUC, f"AUC {same['auc']:.3f}",
              f"> {CONTROL_AUC:g}", is_control=True),
        Check("ids of one's own case are recovered", same["recovery_p"] < CONTROL_P, _recovery(same),
              f"p of guessing < {CONTROL_P:g}", is_control=True),
        Check("another tenant's ids are ranked as by chance", low <= cross["auc"] <= high, f"AUC {cross['auc']:.3f}",
              f"{low:g} to {high:g}"),
        Check("another tenant's ids are recovered no more than by guessing", cross["recovery_p"] >= ALPHA,
              _recovery(cross), f"p of guessing >= {ALPHA:g}"),
    ]  # fmt: skip


def raw(searches: dict[str, list[Search]]) -> dict[str, list[dict[str, Any]]]:
    return {condition: [asdict(search) for search in found] for condition, found in searches.items()}


def _recovery(figures: dict[str, Any]) -> str:
    return f"{figures['recovered']} of {figures['searched']}, chance {figures['recovery_chance']:.3f}"
