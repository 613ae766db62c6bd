"""One front for keys and tokens: told apart by shape, refused with a reason."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.authentication import Authenticator
from deployments.trust.principals import MAX_BEARER_CHARS, Principal, Principals
from deployments.trust.tokens import MAX_TOKEN_CHARS, AuthReason
from engine.zone import EPHEMERAL
from tests.deployments.trust.test_tokens import REFUSED, token, verifier

BOB = Principal("bob", "other", EPHEMERAL)
KEYS = Principals({hashlib.sha256(key.encode()).digest(): BOB for key in ("zs-key", "zs-a.b.c", "x.y.z")})
BOTH = Authenticator(KEYS, verifier())
KEYS_ALONE = Authenticator(KEYS)


def test_key_and_token_name_their_principals() -> None:
    assert BOTH.authenticate("Bearer zs-key") == BOB
    ann = BOTH.authenticate(f"bearer {token()}")
    assert isinstance(ann, Principal)
    assert ann.name == "ann"


def test_shape_says_which_is_which() -> None:
    assert BOTH.is_token(f"Bearer {token()}")
    assert not BOTH.is_token("Bearer zs-key")
    assert not BOTH.is_token("Bearer zs-a.b.c")
    assert not BOTH.is_token(None)
    assert BOTH.authenticate("Bearer zs-a.b.c") == BOB


def test_without_a_verifier_a_token_is_a_key_that_nobody_has() -> None:
    assert not KEYS_ALONE.is_token(f"Bearer {token()}")
    assert KEYS_ALONE.authenticate(f"Bearer {token()[:MAX_BEARER_CHARS]}") is AuthReason.UNKNOWN_KEY
    assert KEYS_ALONE.authenticate("Bearer x.y.z") == BOB


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, AuthReason.NO_CREDENTIAL),
        ("", AuthReason.NO_CREDENTIAL),
        ("Bearer ", AuthReason.NO_CREDENTIAL),
        ("Basic zs-key", AuthReason.NO_CREDENTIAL),
        (token(), AuthReason.NO_CREDENTIAL),
        ("Bearer zs-other", AuthReason.UNKNOWN_KEY),
        ("Bearer zs-key zs-key", AuthReason.UNKNOWN_KEY),
        ("Bearer \ud800", AuthReason.UNKNOWN_KEY),
        ("Bearer " + "x" * (MAX_BEARER_CHARS + 1), AuthReason.TOO_LONG),
        ("Bearer a.b." + "x" * MAX_TOKEN_CHARS, AuthReason.TOO_LONG),
        ("Bearer x.y.z", AuthReason.MALFORMED),
        *((f"Bearer {text}", reason) for text, reason in REFUSED.values() if text.count(".") == 2),
    ],
)
def test_header_that_names_nobody_says_why(header: str | None, reason: AuthReason) -> None:
    assert BOTH.authenticate(header) is reason


@given(st.text(max_size=80) | st.text("Bearer .ey-_=", max_size=80).map("Bearer {}".format))
def test_every_header_gets_a_reason(header: str) -> None:
    assert isinstance(BOTH.authenticate(header), AuthReason)
