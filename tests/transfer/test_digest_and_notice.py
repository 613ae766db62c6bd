"""The keyed digest of blocks, and the signed notice that carries it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer.support import KEY
from transfer.digest import DIGEST_BYTES, BlockDigest
from transfer.notice import NOTICE_BYTES, AbortReason, ForgedNotice, Notice, NoticeKind

NONCE = bytes(range(16))
SIZE = 64
BLOCKS = [bytes([i]) * SIZE for i in range(5)]


def digest_of(
    blocks: list[bytes], *, key: bytes = KEY, nonce: bytes = NONCE, binding: bytes = b"b", step: int = 100
) -> bytes:
    digest = BlockDigest(key, nonce, binding, SIZE)
    for start in range(0, len(blocks), step):
        digest.update(memoryview(block) for block in blocks[start : start + step])
    return digest.finish()


def test_digest_does_not_depend_on_how_the_blocks_were_chunked() -> None:
    assert len({digest_of(BLOCKS, step=step) for step in (1, 2, 3, 100)}) == 1
    assert len(digest_of(BLOCKS)) == DIGEST_BYTES


@given(block=st.integers(0, 4), offset=st.integers(0, SIZE - 1), mask=st.integers(1, 255))
def test_digest_changes_with_any_byte(block: int, offset: int, mask: int) -> None:
    damaged = [bytearray(item) for item in BLOCKS]
    damaged[block][offset] ^= mask
    assert digest_of([bytes(item) for item in damaged]) != digest_of(BLOCKS)


def test_digest_depends_on_order_count_key_nonce_and_binding() -> None:
    digests = {
        digest_of(BLOCKS),
        digest_of(BLOCKS[::-1]),
        digest_of(BLOCKS[:-1]),
        digest_of([]),
        digest_of(BLOCKS, key=bytes(32)),
        digest_of(BLOCKS, nonce=bytes(16)),
        digest_of(BLOCKS, binding=b"c"),
    }
    assert len(digests) == 7


def test_what_is_not_a_block_is_refused() -> None:
    digest = BlockDigest(KEY, NONCE, b"", SIZE)
    with pytest.raises(ValueError):
        digest.update([memoryview(bytes(SIZE - 1))])
    with pytest.raises(ValueError):
        BlockDigest(KEY, b"short", b"", SIZE)


DONE = Notice(NONCE, NoticeKind.DONE, 7, bytes(range(DIGEST_BYTES)))
ABORTED = Notice(NONCE, NoticeKind.ABORTED, reason=AbortReason.SHUTDOWN)


@pytest.mark.parametrize("notice", [DONE, ABORTED])
def test_notice_survives_its_signature_and_starts_with_its_nonce(notice: Notice) -> None:
    message = notice.sign(KEY)
    assert len(message) == NOTICE_BYTES
    assert message.startswith(NONCE)
    assert Notice.open(KEY, NONCE, message) == notice


@given(position=st.integers(0, NOTICE_BYTES - 1), mask=st.integers(1, 255))
def test_any_flipped_byte_of_a_notice_is_a_forgery(position: int, mask: int) -> None:
    message = bytearray(DONE.sign(KEY))
    message[position] ^= mask
    with pytest.raises(ForgedNotice):
        Notice.open(KEY, NONCE, bytes(message))


def test_notice_of_another_key_nonce_or_length_is_a_forgery() -> None:
    message = DONE.sign(KEY)
    for key, nonce, text in [
        (bytes(32), NONCE, message),
        (KEY, bytes(16), message),
        (KEY, NONCE, message[:-1]),
        (KEY, NONCE, message + b"x"),
        (KEY, NONCE, b""),
    ]:
        with pytest.raises(ForgedNotice):
            Notice.open(key, nonce, text)


def test_notice_of_an_unknown_kind_is_a_forgery() -> None:
    unknown = replace(DONE, kind=9)  # type: ignore[arg-type]
    with pytest.raises(ForgedNotice):
        Notice.open(KEY, NONCE, unknown.sign(KEY))
