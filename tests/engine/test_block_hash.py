"""Block digests: keyed, chained, and bound to all that changes a block's bytes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.block_hash import ROOT_DIGEST, BlockHasher, HashContext, derive_key
from engine.zone import PUBLIC, Zone

KEY = b"0123456789abcdef"
CONTEXT = HashContext("weights", "tokenizer", "layout", "rope")
HASHER = BlockHasher(KEY, CONTEXT)
CASE = Zone.parse("tenant/acme/case/c1")

paths = st.sampled_from(
    ["public", "tenant/a/plan/p", "tenant/a/plan/q", "tenant/b/plan/p", "tenant/a/case/p", "tenant/b/case/p"]
)
inputs = st.tuples(
    st.binary(max_size=32),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    paths.map(Zone.parse),
    st.integers(0, 5),
)


@given(inputs, inputs)
def test_any_change_of_parent_tokens_zone_tenant_or_epoch_changes_the_digest(
    one: tuple[bytes, list[int], Zone, int], other: tuple[bytes, list[int], Zone, int]
) -> None:
    assume(one != other)
    assert HASHER.digest(*one) != HASHER.digest(*other)


@given(inputs, st.integers(0, 3))
def test_changing_one_input_alone_changes_the_digest(one: tuple[bytes, list[int], Zone, int], position: int) -> None:
    parent, tokens, zone, epoch = one
    changed = [
        (parent + b"\0", tokens, zone, epoch),
        (parent, [*tokens[:-1], tokens[-1] ^ 1], zone, epoch),
        (parent, tokens, CASE, epoch),
        (parent, tokens, zone, epoch + 1),
    ][position]
    assert HASHER.digest(*changed) != HASHER.digest(*one)


@pytest.mark.parametrize("field", [item.name for item in fields(HashContext)])
def test_any_change_of_the_context_changes_the_digest(field: str) -> None:
    changed = BlockHasher(KEY, replace(CONTEXT, **{field: "else"}))
    assert changed.digest(ROOT_DIGEST, [1], PUBLIC, 0) != HASHER.digest(ROOT_DIGEST, [1], PUBLIC, 0)


def test_text_that_moves_from_one_field_to_the_next_changes_the_digest() -> None:
    one = BlockHasher(KEY, HashContext("ab", "c", "l", "r"))
    other = BlockHasher(KEY, HashContext("a", "bc", "l", "r"))
    assert one.digest(ROOT_DIGEST, [1], PUBLIC, 0) != other.digest(ROOT_DIGEST, [1], PUBLIC, 0)


def test_another_master_key_gives_another_digest() -> None:
    other = BlockHasher(b"f" * 16, CONTEXT)
    assert other.digest(ROOT_DIGEST, [1], PUBLIC, 0) != HASHER.digest(ROOT_DIGEST, [1], PUBLIC, 0)


@given(inputs)
def test_equal_inputs_give_equal_digests_in_any_process(one: tuple[bytes, list[int], Zone, int]) -> None:
    assert BlockHasher(KEY, CONTEXT).digest(*one) == HASHER.digest(*one)
    assert len(HASHER.digest(*one)) == 32


def test_a_short_master_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        BlockHasher(b"short", CONTEXT)


def test_key_derivation_agrees_with_rfc_5869() -> None:
    # Test case 3 of the RFC: empty salt, empty info.
    assert derive_key(b"\x0b" * 22, b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )
