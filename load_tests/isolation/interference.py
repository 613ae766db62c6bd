"""The interference audit: one tenant floods both pools; does another that stays within its floor lose a hit?

The victim's tenant has a floor and the bystander has none: the control, whose hits must go. The victim's blocks are the
least recently used, so a pool without floors gives them up first. Counts only, no times.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from load_tests.isolation.checks import Check
from load_tests.isolation.system import ATTACKER, BYSTANDER, VICTIM, Counts, System
from load_tests.isolation.texts import fresh_prompt, fresh_token_ids

# Of about 20 blocks each: the victim's lie within its floor of 128, and both leave too little free for the flood.
NUM_PROMPTS = {VICTIM: 5, BYSTANDER: 15}
# A request's room is sought among its own tenant's idle blocks first, so a flood takes from others only by what it uses
# at one time: few long prompts, all together.
FLOOD_PROMPT_TOKENS = 1900
FLOOD_SHARE = 1.25  # of the tokens that the larger pool holds, at least


def measure(system: System, rng: random.Random) -> dict[str, Any]:
    """Hits of both in prompt tokens, before and after the flood, and what the flood evicted."""
    prompts = {caller: [fresh_prompt(rng) for _ in range(count)] for caller, count in NUM_PROMPTS.items()}
    for caller, texts in prompts.items():
        _hits(system, caller, texts)
    hits_before = {caller: _hits(system, caller, texts) for caller, texts in prompts.items()}
    before = system.counts()
    num_floods = -(-round(FLOOD_SHARE * max(system.pool_tokens.values())) // FLOOD_PROMPT_TOKENS)
    system.flood(ATTACKER, [fresh_token_ids(rng, FLOOD_PROMPT_TOKENS) for _ in range(num_floods)])
    after = system.counts()
    hits_after = {caller: _hits(system, caller, texts) for caller, texts in prompts.items()}
    return {
        "flood_tokens": num_floods * FLOOD_PROMPT_TOKENS,
        "pool_tokens": dict(system.pool_tokens),
        "evicted_blocks": _gained(before, after),
        "hits_before": hits_before,
        "hits_after": hits_after,
    }


def judge(figures: dict[str, Any]) -> list[Check]:
    before, after = figures["hits_before"], figures["hits_after"]
    return [
        Check(
            "the flood evicts on both pools",
            all(figures["evicted_blocks"].get(pool, 0) > 0 for pool in figures["pool_tokens"]),
            ", ".join(f"{pool} {count} blocks" for pool, count in sorted(figures["evicted_blocks"].items())),
            "each > 0",
            is_control=True,
        ),
        Check(
            "it takes hits from a tenant without a floor",
            after[BYSTANDER] < before[BYSTANDER],
            _shown(before[BYSTANDER], after[BYSTANDER]),
            "fewer",
            is_control=True,
        ),
        Check(
            "it takes none from a tenant within its floor",
            0 < before[VICTIM] == after[VICTIM],
            _shown(before[VICTIM], after[VICTIM]),
            "equal, more than 0",
        ),
    ]


def _hits(system: System, caller: str, texts: Sequence[str]) -> int:
    before = system.counts()
    for text in texts:
        system.ask(caller, text)
    return system.counts().cached_tokens - before.cached_tokens


def _gained(before: Counts, after: Counts) -> dict[str, int]:
    return {pool: count - before.evicted_blocks.get(pool, 0) for pool, count in after.evicted_blocks.items()}


def _shown(before: int, after: int) -> str:
    return f"{before} tokens hit before, {after} after"
