"""Labelled messages to labelled tokens, with a real tokenizer and its template."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.prompts import ZonedMessage, ZonedText, one_text, tokenise_chat
from engine.chat_template import ContentSpan
from engine.tokenizer import Tokenizer
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan

PLAN = Zone.parse("tenant/t/plan/p")
CASE = Zone.parse("tenant/t/case/c")


def message(role: str, *texts: tuple[str, Zone]) -> ZonedMessage:
    return ZonedMessage(role, tuple(ZonedText(text, zone) for text, zone in texts))


@pytest.mark.model
def test_each_token_has_the_zone_of_the_text_up_to_it(tokenizer: Tokenizer) -> None:
    messages = [
        message("system", ("You review claims. ", PUBLIC), ("Visits need a referral.", PLAN)),
        message("user", ("Claim 7 has one visit.", CASE)),
    ]
    prompt = tokenise_chat(tokenizer, messages, CASE)
    assert [span.zone for span in prompt.zone_spans] == [PUBLIC, PLAN, CASE]
    public, plan, case = prompt.zone_spans
    text = [tokenizer.decode(list(prompt.token_ids[a:b])) for a, b in ((0, public.end), (0, plan.end))]
    assert "You review claims." in text[0]
    assert "Visits" not in text[0]
    assert "referral." in text[1]
    assert "Claim" not in text[1]
    assert case.end == len(prompt.token_ids)


@pytest.mark.model
def test_the_templates_own_beginning_is_no_more_shared_than_the_first_text(tokenizer: Tokenizer) -> None:
    """SmolLM2's template begins with a system prompt of its own where there is none: no manifest lists that."""
    messages = [message("user", ("First.", CASE)), message("assistant", ("Second.", PLAN))]
    assert {span.zone for span in tokenise_chat(tokenizer, messages, CASE).zone_spans} == {CASE}


@pytest.mark.model
@pytest.mark.parametrize("private", [CASE, EPHEMERAL])
def test_what_follows_shared_text_is_private(private: Zone, tokenizer: Tokenizer) -> None:
    prompt = tokenise_chat(tokenizer, [message("user", ("All of it is shared.", PLAN))], private)
    num_tokens = len(prompt.token_ids)
    assert prompt.zone_spans == (ZoneSpan(num_tokens - 1, PLAN), ZoneSpan(num_tokens, private))


@pytest.mark.parametrize("spans", [None, (ContentSpan(6, 9), ContentSpan(0, 3))])
def test_a_template_that_hides_or_moves_the_contents_makes_all_of_it_private(spans: Any) -> None:
    chat = SimpleNamespace(token_ids=(1, 2, 3), offsets=((0, 3), (3, 6), (6, 9)), spans=spans)
    tokenizer = cast(Tokenizer, SimpleNamespace(encode_chat=lambda messages: chat))
    messages = [message("system", ("abc", PUBLIC)), message("user", ("def", CASE))]
    assert tokenise_chat(tokenizer, messages, CASE).zone_spans == (ZoneSpan(3, CASE),)


def test_one_text_is_closed_too() -> None:
    assert one_text([1, 2, 3], PLAN, CASE).zone_spans == (ZoneSpan(2, PLAN), ZoneSpan(3, CASE))
    assert one_text([1, 2, 3], EPHEMERAL, EPHEMERAL).zone_spans == (ZoneSpan(3, EPHEMERAL),)
