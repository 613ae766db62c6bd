"""What keeps zones apart, for every input: digests, the join, and the zone of a block over a change of zone.

The laws of the join and single changes of a digest's inputs stand in tests/engine/{test_zone,test_block_hash}.py, zones
of tokens in tests/deployments/test_labelling.py. Here: any two inputs that differ, and what a whole engine finds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from engine.block_hash import MIN_MASTER_KEY_BYTES, ROOT_DIGEST, BlockHasher, HashContext
from engine.request import Request
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneKind, ZoneSpan, joined_zone
from tests.engine.toy_model import BLOCK_SIZE, ToyEngine, make_request

settings.register_profile("isolation", deadline=None, derandomize=True, database=None)
settings.load_profile("isolation")

KEY = b"k" * MIN_MASTER_KEY_BYTES
CONTEXT = HashContext("weights", "tokenizer", "layout", "rope")

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,3}", fullmatch=True)
any_zone = st.one_of(
    st.sampled_from([PUBLIC, EPHEMERAL]),
    st.builds(lambda tenant: Zone(ZoneKind.MIXED, tenant), names),
    st.builds(Zone, st.sampled_from([ZoneKind.PLAN, ZoneKind.CASE]), names, names),
)
contexts = st.builds(HashContext, *[st.text(max_size=4)] * 5)
keys = st.binary(min_size=MIN_MASTER_KEY_BYTES, max_size=MIN_MASTER_KEY_BYTES + 2)
epochs = st.integers(0, 2**64 - 1)
token_lists = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4)


@dataclass(frozen=True)
class DigestInputs:
    """All that the digest of one block depends on."""

    master_key: bytes
    context: HashContext
    parent: bytes
    token_ids: tuple[int, ...]
    zone: Zone
    epoch: int

    def digest(self) -> bytes:
        hasher = BlockHasher(self.master_key, self.context)
        return hasher.digest(self.parent, self.token_ids, self.zone, self.epoch)


inputs = st.builds(
    DigestInputs, keys, contexts, st.sampled_from([ROOT_DIGEST, b"p" * 32]), token_lists.map(tuple), any_zone, epochs
)


@given(inputs, inputs, st.sets(st.sampled_from(list(DigestInputs.__dataclass_fields__))))
def test_inputs_that_differ_in_anything_have_different_digests(
    one: DigestInputs, other: DigestInputs, taken: set[str]
) -> None:
    """Also where they differ in one field alone, or in how text is divided between two."""
    other = replace(one, **{name: getattr(other, name) for name in taken})
    assume(one != other)
    assert one.digest() != other.digest()


@given(inputs, st.integers(0, 8 * MIN_MASTER_KEY_BYTES - 1))
def test_every_bit_of_the_master_key_counts(one: DigestInputs, bit: int) -> None:
    flipped = (int.from_bytes(one.master_key, "little") ^ (1 << bit)).to_bytes(len(one.master_key), "little")
    assert replace(one, master_key=flipped).digest() != one.digest()


@given(st.lists(inputs, min_size=2, max_size=4), st.data())
def test_a_change_in_an_early_block_changes_the_digest_of_every_later_one(
    blocks: list[DigestInputs], data: st.DataObject
) -> None:
    def chain(of: list[DigestInputs]) -> list[bytes]:
        hasher, digests = BlockHasher(KEY, CONTEXT), [ROOT_DIGEST]
        for block in of:
            digests.append(hasher.digest(digests[-1], block.token_ids, block.zone, block.epoch))
        return digests[1:]

    changed = data.draw(st.integers(0, len(blocks) - 1))
    other = list(blocks)
    other[changed] = replace(blocks[changed], token_ids=(*blocks[changed].token_ids, 7))
    equal = [one == two for one, two in zip(chain(blocks), chain(other), strict=True)]
    assert equal == [index < changed for index in range(len(blocks))]


# -- the join


@given(any_zone, any_zone, any_zone)
def test_join_is_monotone_and_the_least_zone_above_both(one: Zone, other: Zone, third: Zone) -> None:
    def is_below(low: Zone, high: Zone) -> bool:
        return low.join(high) == high

    if is_below(one, other):
        assert is_below(one.join(third), other.join(third))
    joined = one.join(other)
    assert is_below(one, joined)
    assert is_below(other, joined)
    if is_below(one, third) and is_below(other, third):
        assert is_below(joined, third)


@given(st.lists(any_zone, min_size=1, max_size=6))
def test_what_is_cacheable_holds_text_of_one_tenant_and_one_case_at_most(zones: list[Zone]) -> None:
    joined = reduce(Zone.join, zones)
    if joined.is_cacheable:
        assert {zone.tenant for zone in zones} <= {"", joined.tenant}
        assert {zone for zone in zones if zone.kind is ZoneKind.CASE} <= {joined}


# -- blocks of a prompt

# Few zones and few tokens, so that two prompts often agree: what is looked for is a hit that must not be.
PROMPT_ZONES = [
    PUBLIC,
    Zone.parse("tenant/a/plan/gold"),
    Zone.parse("tenant/a/plan/silver"),
    Zone.parse("tenant/a/case/one"),
    Zone.parse("tenant/a/case/two"),
    Zone.parse("tenant/b/plan/gold"),
    Zone.parse("tenant/b/case/one"),
    EPHEMERAL,
]


@dataclass(frozen=True)
class Prompt:
    """Pieces of a prompt, (token, count, zone) each; every zone has one epoch, 0 where none is given."""

    pieces: tuple[tuple[int, int, Zone], ...]
    epochs: tuple[tuple[Zone, int], ...] = ()
    unlabelled: int = 0  # tokens after the last label

    @property
    def token_ids(self) -> tuple[int, ...]:
        labelled = [token for token, count, _ in self.pieces for _ in range(count)]
        return (*labelled, *range(self.unlabelled))

    @property
    def labels(self) -> list[Zone]:
        """The zone that each token asks for."""
        return [zone for _, count, zone in self.pieces for _ in range(count)] + [EPHEMERAL] * self.unlabelled

    def epoch(self, zone: Zone) -> int:
        return dict(self.epochs).get(zone, 0)  # the last one given

    def request(self, request_id: str) -> Request:
        spans: list[ZoneSpan] = []
        for zone, run in groupby(self.labels[: len(self.labels) - self.unlabelled]):
            end = (spans[-1].end if spans else 0) + len(list(run))
            spans.append(ZoneSpan(end, zone, self.epoch(zone)))
        own = joined_zone(tuple(spans))
        return make_request(request_id, self.token_ids, spans, max_tokens=1, epoch=self.epoch(own))

    def key_of_block(self, index: int) -> tuple[object, ...] | None:
        """Equal for two prompts where they may share this block; None where nobody may have it.

        Epochs of all text up to it count: once a zone is purged nothing that was computed from it is found again.
        """
        end = (index + 1) * BLOCK_SIZE
        labels = self.labels[:end]
        if len(labels) < end or not reduce(Zone.join, labels).is_cacheable:
            return None
        zones = [reduce(Zone.join, labels[: (i + 1) * BLOCK_SIZE]) for i in range(index + 1)]
        return self.token_ids[:end], zones, [self.epoch(zone) for zone in labels]


def num_shared(one: Prompt, other: Prompt, *, with_labels: bool) -> int:
    """Leading blocks of `other`, its last token apart, that it may find after `one`.

    Args:
        with_labels: Count only blocks whose every token asks for the same zone in both, whatever the joins.
    """
    count = 0
    for count in range(len(other.token_ids)):
        end = (count + 1) * BLOCK_SIZE
        key = other.key_of_block(count)
        is_same = key is not None and key == one.key_of_block(count)
        if with_labels:
            is_same = is_same and one.labels[:end] == other.labels[:end]
        if not is_same or end >= len(other.token_ids):
            break
    return count


lengths = st.one_of(st.integers(1, BLOCK_SIZE - 1), st.integers(1, 2 * BLOCK_SIZE + 1))
pieces = st.tuples(st.integers(0, 1), lengths, st.sampled_from(PROMPT_ZONES))
prompts = st.builds(
    Prompt,
    st.lists(pieces, min_size=1, max_size=4).map(tuple),
    st.dictionaries(st.sampled_from(PROMPT_ZONES), st.integers(0, 1), max_size=2).map(lambda d: tuple(d.items())),
    st.sampled_from([0, 0, 0, 5]),
)


@st.composite
def related(draw: st.DrawFn, one: Prompt) -> Prompt:
    """Another prompt that differs little: in one token, one label, one length, one epoch, or its end."""
    at = draw(st.integers(0, len(one.pieces) - 1))
    token, count, zone = one.pieces[at]
    kind = draw(st.sampled_from(["same", "token", "zone", "count", "epoch", "end"]))
    if kind == "epoch":
        return replace(one, epochs=(*one.epochs, (zone, draw(st.integers(0, 2)))))
    changed = {
        "token": (1 - token, count, zone),
        "zone": (token, count, draw(st.sampled_from(PROMPT_ZONES))),
        "count": (token, draw(lengths), zone),
    }.get(kind, one.pieces[at])
    after = (draw(pieces),) if kind == "end" else one.pieces[at + 1 :]
    return replace(one, pieces=(*one.pieces[:at], changed, *after))


SHORT_PLAN = Prompt(((0, 2, PROMPT_ZONES[1]), (1, 9, PROMPT_ZONES[3])))


@settings(max_examples=300)
@given(prompts.flatmap(lambda first: st.tuples(st.just(first), st.one_of(related(first), prompts))))
@example((SHORT_PLAN, replace(SHORT_PLAN, epochs=((PROMPT_ZONES[1], 1),))))  # too short to own a block
def test_an_engine_finds_only_blocks_whose_tokens_zones_and_epochs_all_agree(pair: tuple[Prompt, Prompt]) -> None:
    """And all of them, where the two are labelled alike."""
    first, second = pair
    engine = ToyEngine()
    engine.run(first.request("first"))
    engine.run(second.request("second"))
    num_found = engine.last("second").num_cached_tokens // BLOCK_SIZE
    assert num_shared(first, second, with_labels=True) <= num_found <= num_shared(first, second, with_labels=False)


@given(prompts, st.data(), st.booleans())
def test_after_a_purge_nothing_that_holds_text_of_the_zone_is_found(
    prompt: Prompt, data: st.DataObject, knows_of_it: bool
) -> None:
    """By a request of the new epoch, nor by any that still has the old: those leave nothing for each other either."""
    engine = ToyEngine()
    engine.run(prompt.request("before"))
    zone = data.draw(st.sampled_from([zone for zone in prompt.labels if zone.is_cacheable] or [PUBLIC]))
    epoch = prompt.epoch(zone) + 1
    engine.purge(zone.path, epoch)
    engine.check()
    again = replace(prompt, epochs=(*prompt.epochs, (zone, epoch))) if knows_of_it else prompt
    first = prompt.labels.index(zone) // BLOCK_SIZE if zone in prompt.labels else len(prompt.labels)
    for name in ("after",) if knows_of_it else ("after", "and after"):
        engine.run(again.request(name))
        assert engine.last(name).num_cached_tokens <= first * BLOCK_SIZE


@given(prompts, st.integers(1, 9))
def test_a_block_over_a_change_of_zone_is_as_private_as_all_its_tokens_and_all_before_it(
    prompt: Prompt, block_size: int
) -> None:
    request, labels = prompt.request("r"), prompt.labels
    before = PUBLIC
    for index in range(len(labels) // block_size):
        zone = request.zone_of_block(index, block_size)
        assert zone == reduce(Zone.join, labels[: (index + 1) * block_size])
        assert before.join(zone) == zone
        before = zone
