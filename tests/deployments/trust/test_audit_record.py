"""Which events and values a record takes, and its canonical form."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.audit.record import (
    EVENTS,
    FIELDS,
    MAX_COUNT,
    MAX_RECORD_BYTES,
    AuditEvent,
    Value,
    canonical,
    parse_canonical,
)

DIGEST = "ab" * 32
LONGEST: dict[str, Value] = {}
for _name, _is_valid in FIELDS.items():
    for _value in (MAX_COUNT, "f" * 64, "a" * 128, "tenant/" + "t" * 64 + "/case/" + "c" * 64):
        if _is_valid(_value):
            LONGEST[_name] = _value
TEXT = "Patient Jane Doe, DOB 1961-02-03, complains of chest pain."

plain_text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=6)
values = plain_text | st.integers(-MAX_COUNT, MAX_COUNT)
plain_documents = st.dictionaries(plain_text, values | st.dictionaries(plain_text, values, max_size=3), max_size=4)


def test_the_kinds_of_events_are_those_of_the_contract() -> None:
    assert sorted(EVENTS) == [
        "audit.anchor", "audit.open", "audit.rotate", "auth.deny", "cache.evict", "cache.hit", "cache.scrub",
        "cache.store", "manifest.load", "manifest.refuse", "policy.load", "policy.refuse", "quant.gate.fail",
        "quant.profile.activate", "review.complete", "segment.deny", "segment.label", "tool.call", "transfer.deny",
        "transfer.recv", "transfer.send", "zone.deny", "zone.purge", "zone.resolve",
    ]  # fmt: skip


def test_every_field_of_every_kind_has_a_type_and_every_type_a_kind() -> None:
    used = {name for required, optional in EVENTS.values() for name in required | optional}
    assert used == set(FIELDS)
    assert set(LONGEST) == used


@pytest.mark.parametrize("kind", EVENTS)
def test_a_record_of_the_longest_values_fits_its_line(kind: str) -> None:
    required, optional = EVENTS[kind]
    event = AuditEvent(kind, **{name: LONGEST[name] for name in required | optional})
    assert len(canonical({"fields": dict(event.fields)})) < MAX_RECORD_BYTES - 1024


@pytest.mark.parametrize("kind", EVENTS)
def test_every_required_field_is_required(kind: str) -> None:
    required, _ = EVENTS[kind]
    assert required
    for name in required:
        with pytest.raises(ValueError, match=name):
            AuditEvent(kind, **{other: LONGEST[other] for other in required - {name}})


REFUSED = [
    TEXT, "", " ", "a b", "a\nb", "a\x00", "\x1b[2J", "a" * 300, "é", "ａ", "а", 1.5, True, None, -1,
    MAX_COUNT + 1, ["a"], {"a": "b"}, b"abcdefabcdefabcdef",
]  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_content_or_another_type(name: str) -> None:
    kind = next(kind for kind, (required, optional) in EVENTS.items() if name in required | optional)
    fields = {other: LONGEST[other] for other in EVENTS[kind][0] | {name}}
    AuditEvent(kind, **fields)
    for value in REFUSED:
        with pytest.raises(ValueError, match=f"field {name} has") as refusal:
            AuditEvent(kind, **(fields | {name: value}))  # type: ignore[arg-type]
        assert TEXT not in str(refusal.value)


@pytest.mark.parametrize("zone", ["tenant/a/case/..", "tenant//case/a", "PUBLIC", "tenant/a/case/A", "public/"])
def test_a_zone_is_a_zone_path(zone: str) -> None:
    with pytest.raises(ValueError, match="field zone has"):
        AuditEvent("cache.store", zone=zone, num_blocks=1)


def test_a_field_that_the_kind_does_not_have_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="no such field") as refusal:
        AuditEvent("cache.store", zone="public", num_blocks=1, **{TEXT: 1})
    assert TEXT not in str(refusal.value)
    with pytest.raises(ValueError, match="no such field"):
        AuditEvent("cache.store", zone="public", num_blocks=1, reason="other-kinds-field")


def test_a_kind_that_is_not_listed_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="no such kind") as refusal:
        AuditEvent(TEXT, reason="a")
    assert TEXT not in str(refusal.value)


def test_an_event_does_not_change() -> None:
    event = AuditEvent("cache.store", zone="public", num_blocks=1)
    with pytest.raises(AttributeError):
        event.kind = "cache.hit"
    with pytest.raises(TypeError):
        event.fields["zone"] = TEXT  # type: ignore[index]
    assert "public" not in repr(event)


def test_canonical_form_is_sorted_without_spaces() -> None:
    assert canonical({"b": 1, "a": {"d": "x", "c": -2}}) == b'{"a":{"c":-2,"d":"x"},"b":1}'


@given(plain_documents, plain_documents)
def test_canonical_form_is_injective(one: dict[str, object], other: dict[str, object]) -> None:
    assert (canonical(one) == canonical(other)) == (one == other)


@given(plain_documents)
def test_a_document_is_read_back_from_its_canonical_form(document: dict[str, object]) -> None:
    data = canonical(document)
    assert parse_canonical(data) == document
    assert json.loads(data) == document


@given(plain_documents, st.data())
def test_only_the_canonical_form_is_read(document: dict[str, object], data: st.DataObject) -> None:
    other = data.draw(
        st.sampled_from([
            json.dumps(document).encode(),
            json.dumps(document, indent=0).encode(),
            b" " + canonical(document),
            canonical(document) + b"\n",
            canonical(document).replace(b'"', b'"\\u0061', 1),
            canonical(document)[:-1] + (b',"a":1.0}' if document else b'"a":1.0}'),
        ])
    )  # fmt: skip
    if other != canonical(document):
        try:
            read = parse_canonical(other)
        except ValueError:
            return
        assert canonical(read) == other


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1.0}', b'{"a":1e3}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-0}', b'{"a":true}', b'{"a":null}',
        b'{"a":[1]}', b'{"a":1,"a":1}', b'{"b":1,"a":1}', b'{"a": 1}', b'{"a":"\\u0062"}', b'{"a":"\\ud800"}',
        '{"a":"é"}'.encode(), b'{"a":"\\n"}', b'{"a":{"b":{"c":1}}}', b"[]", b"1", b"", b"{", b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}", b'{"a":9007199254740992}', b"\xff",
    ],
    ids=lambda data: ascii(data[:24]),
)  # fmt: skip
def test_other_forms_are_not_read(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_canonical(data)


@pytest.mark.parametrize(
    "text", ["\ud83d\ude00", "\U0001f600", unicodedata.normalize("NFD", "é"), "\x7f", "\t"], ids=ascii
)
def test_text_that_could_be_written_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        canonical({"a": text})
    with pytest.raises(ValueError):
        canonical({text: 1})


@pytest.mark.parametrize("value", [1.0, True, None, ["a"], ("a",), b"a", MAX_COUNT + 1, {1: "a"}, {"a": {"b": 1}}])
def test_other_values_have_no_canonical_form(value: object) -> None:
    with pytest.raises(ValueError):
        canonical({"a": value})


def test_the_arithmetics_of_a_mixed_pool_are_joined_by_a_plus() -> None:
    name = "native-avx2-bfloat16+torch-float32-cpu"
    fields = {"review_id": "r-1", "zone": "ephemeral", "outcome": "answered", "output_digest": DIGEST}
    assert AuditEvent("review.complete", **fields, arithmetic=name).fields["arithmetic"] == name
    with pytest.raises(ValueError, match="field model has"):
        AuditEvent("review.complete", **fields, model=name)
