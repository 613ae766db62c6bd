"""Prompts of the audit: each drawn from the source of chance it is given, so that a seed names them all."""

from __future__ import annotations

import random

_SENTENCES = (
    "The claim was received on time and the member was eligible on the date of service.",
    "The provider billed four units of physical therapy on the same day as an office visit.",
    "A referral was on file before the first visit and covers six further visits this year.",
    "The plan pays for one chest X-ray a day unless the notes name a second reason.",
    "The notes describe pain in the left knee after a fall and a swelling that did not go down.",
    "An authorization was asked for by telephone and confirmed by letter two days later.",
    "The allowed amount of the second line is less than half of what was charged.",
    "The member has met the deductible for the year and owes a copayment of thirty dollars.",
    "The rendering provider is in the network and bills under the address of the group.",
    "The diagnosis on the third line does not support the procedure that was coded.",
    "An earlier claim with the same codes was paid in full in the month before.",
    "The modifier on the first line says that the service was distinct from the others.",
    "The record shows that the blood panel was ordered and read on the same morning.",
    "The reviewer asked for the operative report and received it within one week.",
)
_TOKEN_IDS = range(1000, 20000)  # ordinary tokens in every vocabulary we serve
_NUM_IN_PROBE = 14
_NUM_AROUND_ID = 7
MEMBER_ID_DIGITS = 9


def nonce(rng: random.Random) -> str:
    return f"{rng.getrandbits(64):016x}"


def fresh_prompt(rng: random.Random) -> str:
    """About 300 tokens that differ from every other prompt's from the first few on."""
    return f"Note {nonce(rng)}. {' '.join(rng.sample(_SENTENCES, _NUM_IN_PROBE))}"


def fresh_token_ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(_TOKEN_IDS, k=count)


def member_ids(rng: random.Random, count: int) -> list[str]:
    """Distinct, drawn anew for each victim: no earlier search can have left any of them in a cache."""
    return [f"M{number}" for number in rng.sample(range(10 ** (MEMBER_ID_DIGITS - 1), 10**MEMBER_ID_DIGITS), count)]


def record_of(member_id: str) -> str:
    """About 300 tokens that are known but for the id in their middle."""
    before, after = _SENTENCES[:_NUM_AROUND_ID], _SENTENCES[_NUM_AROUND_ID:]
    return f"{' '.join(before)} Member {member_id}. {' '.join(after)}"
