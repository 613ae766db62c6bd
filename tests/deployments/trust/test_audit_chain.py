"""The chain without files: what is sealed is accepted, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.audit.chain import (
    GENESIS,
    ChainVerifier,
    Fault,
    Head,
    Record,
    chain_key,
    open_anchor,
    seal,
    seal_anchor,
)
from tests.deployments.trust.audit_support import KEY, hit


def chain(num_records: int, stream: str = "a", key: bytes = KEY, offset: int = 0) -> list[Record]:
    records, head = [], GENESIS
    for number in range(num_records):
        record = seal(hit(number + offset), stream=stream, time_ms=1000 + number, head=head, key=key)
        head = record.head
        records.append(record)
    return records


def faults(lines: list[bytes], key: bytes = KEY, **options: object) -> list[tuple[Fault, int]]:
    verifier = ChainVerifier("a", key, **options)  # type: ignore[arg-type]
    found = (verifier.check(line)[1] for line in lines)
    return [(fault.fault, fault.seq) for fault in found if fault is not None]


LINES = [record.line() for record in chain(5)]


def test_a_chain_is_accepted() -> None:
    verifier = ChainVerifier("a", KEY)
    for record in chain(5):
        assert verifier.check(record.line()) == (record, None)
    assert verifier.head == chain(5)[-1].head
    assert verifier.first_seq == 1


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x20, 0x80])
def test_every_changed_byte_of_every_record_is_found(flip: int) -> None:
    whole = b"".join(LINES)
    for position in range(len(whole)):
        changed = whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
        assert faults(changed.splitlines(keepends=True)), position


@given(st.integers(0, len(b"".join(LINES)) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_every_byte_put_in_or_taken_out_is_found(position: int, put_in: bytes, num_taken: int) -> None:
    whole = b"".join(LINES)
    changed = whole[:position] + put_in + whole[position + num_taken :]
    found = faults(changed.splitlines(keepends=True))
    is_cut_at_a_line = changed in {b"".join(LINES[:length]) for length in range(len(LINES) + 1)}
    assert bool(found) != is_cut_at_a_line  # a cut between two lines is for the anchors to find


@given(st.permutations(range(5)))
def test_every_other_order_is_found(order: list[int]) -> None:
    assert bool(faults([LINES[index] for index in order])) == (order != sorted(order))


@given(st.sets(st.integers(0, 4)))
def test_every_drop_before_the_last_record_is_found(dropped: set[int]) -> None:
    kept = [index for index in range(5) if index not in dropped]
    assert bool(faults([LINES[index] for index in kept])) == (kept != list(range(len(kept))))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([*LINES[:2], *LINES[3:]], [(Fault.GAP, 4)]),
        (LINES[2:], [(Fault.HEAD_CUT, 3)]),
        ([*LINES[:3], LINES[2], *LINES[3:]], [(Fault.MISPLACED, 3)]),
        ([*LINES, LINES[0]], [(Fault.MISPLACED, 1)]),
        ([LINES[0], LINES[2], LINES[1], *LINES[3:]], [(Fault.GAP, 3), (Fault.MISPLACED, 2)]),
        ([*LINES[:2], b"{}\n", *LINES[3:]], [(Fault.MALFORMED, 3)]),
        ([*LINES[:2], b"\n", *LINES[2:]], [(Fault.MALFORMED, 3), (Fault.MISPLACED, 3)]),
        ([*LINES[:2], *(r.line() for r in chain(5, "b")[2:])], [(Fault.FOREIGN, seq) for seq in (3, 4, 5)]),
        ([*LINES[:2], *(r.line() for r in chain(5, offset=9)[2:])], [(Fault.SPLICED, 3)]),
        ([*LINES[:2], *(r.line() for r in chain(5, key=b"other")[2:])], [(Fault.UNSIGNED, seq) for seq in (3, 4, 5)]),
    ],
    ids=["drop", "head cut", "twice", "first again at the end", "swapped", "replaced", "blank line", "another log",
         "another log of the same name", "a forger without the key"],
)  # fmt: skip
def test_a_fault_is_told_once_and_where_it_is(lines: list[bytes], expected: list[tuple[Fault, int]]) -> None:
    assert faults(lines) == expected


def test_an_edit_is_found_with_and_without_a_new_hash() -> None:
    record = chain(5)[2]
    edited = replace(record, fields=record.fields | {"num_blocks": 99})
    assert faults([*LINES[:2], edited.line(), *LINES[3:]]) == [(Fault.EDITED, 3)]
    forged = seal(hit(99), stream="a", time_ms=record.time_ms, head=chain(2)[1].head, key=b"not the key")
    assert faults([*LINES[:2], forged.line(), *LINES[3:]]) == [(Fault.UNSIGNED, 3)]


def test_a_wrong_key_is_found_at_every_record() -> None:
    assert faults(LINES, key=chain_key(b"x" * 32)) == [(Fault.UNSIGNED, seq) for seq in range(1, 6)]


def test_a_log_may_begin_after_an_admitted_head_and_after_no_other() -> None:
    records = chain(5)
    assert faults(LINES[2:], admitted=[records[1].head]) == []
    assert faults(LINES[3:], admitted=[records[1].head]) == [(Fault.HEAD_CUT, 4)]
    assert faults(LINES[2:], admitted=[Head(2, "ab" * 32)]) == [(Fault.HEAD_CUT, 3)]


def test_an_anchor_is_read_back_for_its_stream_and_key_alone() -> None:
    head = chain(3)[-1].head
    data = seal_anchor(head, stream="a", key=KEY)
    assert open_anchor(data, stream="a", key=KEY) == head
    with pytest.raises(ValueError, match="another log"):
        open_anchor(data, stream="b", key=KEY)
    with pytest.raises(ValueError, match="MAC"):
        open_anchor(data, stream="a", key=b"other")


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_every_changed_byte_of_an_anchor_is_found(flip: int) -> None:
    data = seal_anchor(chain(3)[-1].head, stream="a", key=KEY)
    for position in range(len(data)):
        changed = data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :]
        with pytest.raises(ValueError):
            open_anchor(changed, stream="a", key=KEY)
        with pytest.raises(ValueError):
            open_anchor(data[:position], stream="a", key=KEY)


def test_a_head_is_read_back_from_its_text() -> None:
    head = chain(3)[-1].head
    assert Head.parse(str(head)) == head
    for text in (
        "",
        "3",
        "3:",
        ":" + head.hash,
        f"-3:{head.hash}",
        f"³:{head.hash}",
        f"3:{head.hash}0",
        f"3:{head.hash.upper()}",
    ):
        with pytest.raises(ValueError, match="SEQ:HASH"):
            Head.parse(text)
