"""Agents of several tenants that discuss claims over the chat API: the load whose price of isolation is measured.

Each conversation opens with the shipped texts and a claim of its own, and later calls carry all that was said before.
A plan is drawn from its seed alone; who calls, and under which labels, is the caller's to say.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.claims.intake import ClaimIntake
from deployments.claims.model import Pseudonymiser
from deployments.claims.plan import load_plan
from deployments.claims.prompt import case_text, shared_segments
from load_tests.local import PLAN
from load_tests.mixed_load import SAMPLES

TENANTS = ("acme", "beta", "gamma")
CASES = tuple(f"case-{number:03}" for number in range(256))  # of each tenant: as many as a principal may own
MAX_TURNS = 4
MAX_OPEN = 4  # conversations of one tenant at a time; a finished one makes room for the next case
NEW_CASE_SHARE = 0.4  # of calls, where both a new case and an open conversation are possible
OUTPUT_TOKENS = (16, 32, 64)
SEGMENTS = "system,rubric,policies"
_PSEUDONYM_KEY = bytes(32)  # of invented members
_ANSWERS = ("The units and the dates agree with the policy.", "One document is missing from the claim.")
_QUESTIONS = (
    "Which line of the policy decides this?",
    "What should the provider send before it is paid?",
    "Write the reason for the member in one sentence.",
    "What would change your recommendation?",
)


@dataclass(frozen=True, slots=True)
class Call:
    """One chat call. `at_s`: after the plan's start. `case`: of its tenant. `segments`: ids of its first messages."""

    at_s: float
    tenant: str
    case: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    seed: int
    segments: str = ""

    def body(self, model: str) -> dict[str, Any]:
        """Streamed, to the full length."""
        return {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": 0.7,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
        }


def sample_claims() -> list[str]:
    """The private part of each sample claim's prompt."""
    intake = ClaimIntake(Pseudonymiser(_PSEUDONYM_KEY, TENANTS[0]))
    claims = [claim for path in sorted(SAMPLES.glob("*.edi")) for claim in intake.read_file(path).claims]
    return [case_text(claim, (), ()) for claim in claims]


def plan_calls(seed: int, *, rate_per_s: float, duration_s: float, claims: Sequence[str]) -> list[Call]:
    """Poisson arrivals over `duration_s`.

    Raises:
        ValueError: They need more cases than a tenant has.
    """
    rng = random.Random(seed)
    opening = tuple(
        {"role": "system", "content": segment.text} for segment in shared_segments(TENANTS[0], load_plan(PLAN))
    )
    cases = {tenant: iter(CASES) for tenant in TENANTS}
    open_conversations: dict[str, list[tuple[str, tuple[dict[str, str], ...]]]] = {tenant: [] for tenant in TENANTS}
    calls: list[Call] = []
    for at_s in _arrivals(rng, rate_per_s, duration_s):
        tenant = rng.choice(TENANTS)
        conversations = open_conversations[tenant]
        if not conversations or (len(conversations) < MAX_OPEN and rng.random() < NEW_CASE_SHARE):
            case = next(cases[tenant], None)
            if case is None:
                raise ValueError(f"more than {len(CASES)} cases of one tenant: fewer arrivals, please")
            note = f"Note {seed}-{tenant}-{case}.\n{rng.choice(claims)}"  # no claim twice
            messages = (*opening, {"role": "user", "content": note})
        else:
            case, messages = conversations.pop(rng.randrange(len(conversations)))
        max_tokens, call_seed = rng.choice(OUTPUT_TOKENS), rng.randrange(1 << 30)
        calls.append(Call(at_s, tenant, case, messages, max_tokens, call_seed, SEGMENTS))
        num_turns = sum(message["role"] == "user" for message in messages)
        if num_turns < MAX_TURNS:
            answer = {"role": "assistant", "content": rng.choice(_ANSWERS)}
            conversations.append((case, (*messages, answer, {"role": "user", "content": rng.choice(_QUESTIONS)})))
    return calls


def _arrivals(rng: random.Random, rate_per_s: float, duration_s: float) -> Iterator[float]:
    at_s = rng.expovariate(rate_per_s)
    while at_s < duration_s:
        yield at_s
        at_s += rng.expovariate(rate_per_s)
