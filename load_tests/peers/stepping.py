"""Times a contender that has a step loop: whole steps, its scheduler and sampler included."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Tokens = dict[str, list[int]]
"""The tokens of each request so far, by its name."""

HEADROOM_TOKENS = 512  # no request may end while it is timed


def time_decode(
    add: Callable[[list[int], int], str],
    step: Callable[[Tokens], None],
    abort: Callable[[list[str]], None],
    prompts: list[list[int]],
    steps: int,
) -> dict[str, Any]:
    """`steps` steps in which every prompt decodes; the prefill is not timed."""
    tokens: Tokens = {add(prompt, steps + HEADROOM_TOKENS): [] for prompt in prompts}
    while not all(tokens.values()):
        step(tokens)
    num_firsts = sum(map(len, tokens.values()))
    started = time.perf_counter()
    for _ in range(steps):
        step(tokens)
    seconds = time.perf_counter() - started
    abort(list(tokens))
    counted = sum(map(len, tokens.values())) - num_firsts
    assert counted == steps * len(prompts), f"{counted} tokens in {steps} steps of {len(prompts)} sequences"
    return {"seconds": seconds, "tokens": counted, "token_ids": list(tokens.values())}


def time_prefill(
    add: Callable[[list[int], int], str], step: Callable[[Tokens], None], prompt: list[int]
) -> dict[str, Any]:
    """From the request to its first token."""
    started = time.perf_counter()
    tokens: Tokens = {add(prompt, 1): []}
    while not all(tokens.values()):
        step(tokens)
    return {"seconds": time.perf_counter() - started, "tokens": len(prompt), "token_ids": list(tokens.values())}
