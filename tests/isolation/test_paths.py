"""Every way into the cache: the same zone must hit, another zone must miss, and what has no zone is never kept.

A suite that asserts only misses passes when caching is off. So each path makes the same assertions by counter deltas,
the hits to the block, and each miss is followed by a hit: what was missed was there.

`PATHS` is the one list of ways. A new one (another endpoint, quantised KV) is an entry there: an object that sends a
text from a place and says what was reused.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import pytest

from engine.zone import EPHEMERAL, Zone
from load_tests.exposition import Exposition
from tests.engine.toy_model import BLOCK_SIZE as TOY_BLOCK_SIZE
from tests.engine.toy_model import VOCAB_SIZE, ToyEngine, make_request
from tests.local_deployment import Deployment

MODEL = "smollm2-135m-instruct"
BLOCK_SIZE = 16
CACHED, COMPUTED = ("decode_cache", "prefill_cache"), ("decode_computed", "prefill_computed")


@dataclass(frozen=True)
class Place:
    """Who sends: a caller of a tenant, about a case or about none."""

    tenant: str
    case: str | None

    @property
    def zone(self) -> Zone:
        return Zone.parse(f"tenant/{self.tenant}/case/{self.case}") if self.case else EPHEMERAL


@dataclass(frozen=True)
class Places:
    """Of one test: nothing was ever sent from them, not even the words that a chat template begins with."""

    home: Place
    other_case: Place
    other_tenant: Place
    nowhere: Place

    @property
    def others(self) -> tuple[Place, ...]:
        return self.other_case, self.other_tenant


@dataclass(frozen=True)
class Found:
    """Counter deltas of one sending: prompt tokens by origin, and by the engines' own count of hits."""

    origins: Mapping[str, float]
    engine_hits: float

    @property
    def reused(self) -> float:
        """Prompt tokens whose KV was in a cache."""
        found = sum(self.origins.get(name, 0) for name in CACHED)
        assert (found > 0) == (self.engine_hits > 0), "the counts of ingress and engines disagree"
        return found

    @property
    def asked(self) -> float:
        return sum(self.origins.values())


def whole_blocks(num_tokens: float, block_size: int = BLOCK_SIZE) -> int:
    """Tokens of a prompt that can be found: its whole blocks, without its last token."""
    return int(num_tokens - 1) // block_size * block_size


class Path(Protocol):
    """One way to send a text. Bound to what serves it."""

    def begin(self, place: Place, text: str) -> Found:
        """Send it for the first time in a zone: what `send` must find there afterwards."""
        ...

    def send(self, place: Place, text: str) -> Found: ...

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        """Least and most tokens that `send` reuses in a zone which holds the text; equal where they can be counted."""
        ...

    def own(self, place: Place, found: Found) -> float:
        """Most tokens that a sending may reuse in a zone which holds nothing: what is shared by a manifest, or what
        its own choices share with each other."""
        ...

    def purge(self, place: Place, text: str) -> None:
        """The zone that the text was sent in."""
        ...

    def close(self) -> None:
        """Leave the cache as it was found."""
        ...


# -- over the deployment


@dataclass
class Served:
    """A path over the real deployment; `computed_on` is the pool that must have computed its prompt at first."""

    deployment: Deployment
    computed_on: str = "prefill"
    _zones: set[Zone] = field(default_factory=set)

    def begin(self, place: Place, text: str) -> Found:
        found = self.send(place, text)
        assert found.origins.get(f"{self.computed_on}_computed", 0) > 0, f"this is another path: {found}"
        return found

    def send(self, place: Place, text: str) -> Found:
        before = self._scrape()
        self.deliver(place, text)
        after = self._scrape()
        self._zones.add(self.zone(place, text))
        name = "zoneserve_prompt_tokens_total"
        origins = {origin: after.total(name, origin=origin) - before.total(name, origin=origin)
                   for origin in CACHED + COMPUTED}  # fmt: skip
        hits = "zoneserve_prefix_cache_hits_total"
        return Found(origins, after.total(hits) - before.total(hits))

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        return whole_blocks(again.asked), whole_blocks(again.asked)

    def own(self, place: Place, found: Found) -> float:
        return 0

    def zone(self, place: Place, text: str) -> Zone:
        """Where the text lies after it was delivered."""
        return place.zone

    def purge(self, place: Place, text: str) -> None:
        self._purge(self.zone(place, text))

    def close(self) -> None:
        for zone in self._zones - {EPHEMERAL}:
            self._purge(zone)

    def _purge(self, zone: Zone) -> None:
        response = httpx.post(
            f"{self.deployment.url}/v1/zones/purge",
            json={"zone": zone.path},
            headers=self.deployment.token_headers(tenant=zone.tenant, roles=["zone-admin"]),
            timeout=60.0,
        )
        assert response.status_code == 200, response.text
        assert response.json()["receipt"]["complete"]

    def deliver(self, place: Place, text: str) -> None:
        raise NotImplementedError

    def post(self, path: str, place: Place, body: Mapping[str, Any]) -> dict[str, Any]:
        """The parsed answer; that of a stream is its last event."""
        cases = [] if place.case is None else [place.case]
        metadata = {} if place.case is None else {"metadata": {"zoneserve.case": place.case}}
        settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 2, "ignore_eos": True}
        response = httpx.post(
            f"{self.deployment.url}{path}",
            json=settings | metadata | body,
            headers=self.deployment.token_headers(tenant=place.tenant, cases=cases),
            timeout=120.0,
        )
        assert response.status_code == 200, response.text
        if response.headers["content-type"].startswith("text/event-stream"):
            *events, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            assert done == "[DONE]"
            return dict(json.loads(events[-1]))
        return dict(response.json())

    def _scrape(self) -> Exposition:
        return Exposition.parse(httpx.get(f"{self.deployment.url}/metrics", timeout=20.0).text)


class Chat(Served):
    def deliver(self, place: Place, text: str) -> None:
        self.post("/v1/chat/completions", place, {"messages": self.messages(text)})

    def messages(self, text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]


class StreamedChat(Chat):
    def deliver(self, place: Place, text: str) -> None:
        answer = self.post("/v1/chat/completions", place, {"messages": self.messages(text), "stream": True})
        assert answer["object"] == "chat.completion.chunk"


class ToolTurns(Chat):
    def messages(self, text: str) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": "You look claims up."},
            {"role": "user", "content": "Which lines are unpaid?"},
            {"role": "assistant", "content": "lookup(lines)"},
            {"role": "tool", "content": text},
        ]


class MultiTurn(Chat):
    """The second turn of a conversation finds the first, the answer that was generated there included."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment)
        self._turns: dict[str, tuple[str, int]] = {}

    def begin(self, place: Place, text: str) -> Found:
        first = Chat.messages(self, text)
        answer = self.post("/v1/chat/completions", place, {"messages": first, "max_tokens": 24})
        self._turns[text] = answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]
        return Found({}, 0)

    def messages(self, text: str) -> list[dict[str, str]]:
        answer, _ = self._turns.get(text, ("Yes.", 0))
        return [
            *Chat.messages(self, text),
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Why?"},
        ]

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        """The answer may be tokenised otherwise than it was generated, so it need not be found."""
        return self._turns[text][1] // BLOCK_SIZE * BLOCK_SIZE, whole_blocks(again.asked)


class SeveralChoices(Chat):
    num_choices = 2

    def deliver(self, place: Place, text: str) -> None:
        body = {"messages": self.messages(text), "n": self.num_choices}
        assert len(self.post("/v1/chat/completions", place, body)["choices"]) == self.num_choices

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        each = whole_blocks(again.asked / self.num_choices)
        return self.num_choices * each, self.num_choices * each

    def own(self, place: Place, found: Found) -> float:
        """A choice may find what the one before it has just computed. Were another zone found, all would find it."""
        return 0 if place.case is None else (self.num_choices - 1) * whole_blocks(found.asked / self.num_choices)


class Completion(Served):
    def deliver(self, place: Place, text: str) -> None:
        self.post("/v1/completions", place, {"prompt": text})


@dataclass
class TokenIds(Served):
    """A prompt of exactly so many token ids, with a new tail each time."""

    num_shared: int = 160
    num_new: int = 0
    max_tokens: int = 2

    def deliver(self, place: Place, text: str) -> None:
        self.post("/v1/completions", place, {"prompt": self.prompt(text), "max_tokens": self.max_tokens})

    def prompt(self, text: str) -> list[int]:
        return ids_of(text, self.num_shared) + ids_of(secrets.token_hex(8), self.num_new)

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        shared = self.num_shared // BLOCK_SIZE * BLOCK_SIZE if self.num_new else whole_blocks(self.num_shared)
        return shared, shared


class HandoffFromPrefillsCache(TokenIds):
    """One token is asked for: it ends the request before decode may keep the blocks, so prefill alone has them."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment, max_tokens=1)

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        assert again.origins["decode_cache"] == 0, f"this is another path: {again}"
        return super().expected(again, text)


class HandoffOfTheRest(TokenIds):
    """Decode holds the beginning; what is new is computed on prefill and pushed behind it."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment, num_new=96)

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        assert again.origins["decode_cache"] > 0 < again.origins["prefill_computed"], f"this is another path: {again}"
        return super().expected(again, text)


class LocalPrefill(TokenIds):
    """Too short to be worth a handoff."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment, computed_on="decode", num_shared=60)


class StraightToDecode(TokenIds):
    """As the ingress calls it, without the ingress: decode and prefill keep zones apart by themselves."""

    def send(self, place: Place, text: str) -> Found:
        self._zones.add(place.zone)
        before = self._engine_hits()
        events = self.deployment.generate(self.prompt(text), zone=place.zone.path, max_tokens=2, ignore_eos=True)
        provenance = events[-1].provenance
        assert provenance is not None, events[-1].error
        return Found(provenance.origins, self._engine_hits() - before)

    def _engine_hits(self) -> float:
        return float(sum(self.deployment.stats(role)["prefix_cache_hits"] for role in ("decode", "prefill")))


@dataclass
class Review(Served):
    """A claim, reviewed. Its case comes from the claim, and the system text and the plan's are shared by manifest.

    Two providers may send the same claim: the same text in two cases of one tenant.
    """

    _shared: dict[str, float] = field(default_factory=dict)
    _cases: dict[tuple[Place, str], Zone] = field(default_factory=dict)

    def zone(self, place: Place, text: str) -> Zone:
        return self._cases[place, text]

    def deliver(self, place: Place, text: str) -> None:
        is_other = place.case is not None and place.case.endswith("-other")
        claim = CLAIM | {
            "claim_id": f"C{hashlib.sha256(text.encode()).hexdigest()[:20]}",
            "billing_npi": PROVIDERS[is_other],
        }
        response = httpx.post(
            f"{self.deployment.url}/v1/reviews",
            json={"claim": claim},
            headers=self.deployment.token_headers(tenant=place.tenant),
            timeout=120.0,
        )
        assert response.status_code == 200, response.text
        (item,) = response.json()["reviews"]
        self._cases[place, text] = Zone.parse(item["review"]["zone"])
        assert not item["review"]["abstained"]

    def begin(self, place: Place, text: str) -> Found:
        self.own(place, Found({}, 0))
        return super().begin(place, text)

    def own(self, place: Place, found: Found) -> float:
        """What any claim of the tenant finds, counted on one that nobody has seen."""
        if place.tenant not in self._shared:
            for _ in range(2):  # the first computes it
                self._shared[place.tenant] = self.send(place, secrets.token_hex(8)).reused
            assert self._shared[place.tenant] > 0
        return self._shared[place.tenant]


PROVIDERS = ("9999000018", "9999000026")
CLAIM: dict[str, Any] = {
    "schema_version": "zoneserve.claim/1",
    "member_id": "SYNTHMEMBER1",
    "payer_id": "SYNTHPAYER1",
    "received_date": "2026-10-05",
    "diagnoses": ["N390"],
    "total_charge_cents": 5200,
    "lines": [
        {
            "line_number": 1,
            "procedure_code": "99213",
            "units": "1",
            "charge_cents": 5200,
            "date_from": "2026-09-15",
            "date_to": "2026-09-15",
            "place_of_service": "11",
            "diagnosis_pointers": [1],
        }
    ],
}


# -- in this process, where it can be forced


class Preemption:
    """A request that loses its seat half-way to one of the same text in another zone, and gets it back.

    What it had computed itself does not count as reused; what the other one found would.
    """

    def __init__(self) -> None:
        self._engine = ToyEngine(64, max_num_seqs=1)
        self._num_sent = 0
        self._epochs: Counter[Zone] = Counter()

    def begin(self, place: Place, text: str) -> Found:
        return self.send(place, text)

    def send(self, place: Place, text: str) -> Found:
        engine, prompt = self._engine, ids_of(text, 30, VOCAB_SIZE - 1)
        self._num_sent += 1
        low, high = f"low-{self._num_sent}", f"high-{self._num_sent}"
        before = engine.stats()
        intruder = Zone.parse(f"tenant/alpha/case/intruder-{self._num_sent}")
        engine.add_request(make_request(low, prompt, place.zone, priority=1, epoch=self._epochs[place.zone]))
        engine.step()
        engine.run(make_request(high, prompt, intruder))
        assert engine.stats().preemptions == before.preemptions + 1
        assert engine.tokens(low) == engine.tokens(high)
        num_lost = len(prompt) % TOY_BLOCK_SIZE if place.case else len(prompt)  # of the block not yet whole, or all
        assert engine.last(low).num_recomputed_tokens == num_lost
        hits = sum(engine.last(name).num_cached_tokens for name in (low, high))
        return Found({"decode_cache": hits, "decode_computed": 2 * len(prompt) - hits},
                     engine.stats().prefix_cache_hits - before.prefix_cache_hits)  # fmt: skip

    def expected(self, again: Found, text: str) -> tuple[float, float]:
        shared = whole_blocks(again.asked / 2, TOY_BLOCK_SIZE)
        return shared, shared

    def own(self, place: Place, found: Found) -> float:
        return 0

    def purge(self, place: Place, text: str) -> None:
        self._epochs[place.zone] += 1
        self._engine.purge(place.zone.path, self._epochs[place.zone])

    def close(self) -> None:
        self._engine.check()


SERVED: dict[str, type[Served]] = {
    "chat": Chat,
    "streaming": StreamedChat,
    "tool turns": ToolTurns,
    "multi-turn": MultiTurn,
    "n choices": SeveralChoices,
    "completions": Completion,
    "reviews": Review,
    "handoff from prefill's cache": HandoffFromPrefillsCache,
    "handoff of the rest": HandoffOfTheRest,
    "local prefill": LocalPrefill,
    "straight to decode": StraightToDecode,
}
IN_PROCESS = {"preemption": Preemption}
MARKS = [pytest.mark.cluster, pytest.mark.model]
PATHS = [*(pytest.param(name, marks=MARKS, id=name) for name in SERVED), *IN_PROCESS]
ALWAYS_IN_A_CASE = {"reviews"}  # that of the claim
WITHOUT_EPOCHS = {"straight to decode"}  # the ingress puts them on; without it a purged zone is not cached any more


def paths_without(names: Set[str]) -> list[Any]:
    return [path for path in PATHS if getattr(path, "id", path) not in names]


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    name: str = request.param
    bound: Path = (
        IN_PROCESS[name]() if name in IN_PROCESS else SERVED[name](request.getfixturevalue("clean_deployment"))
    )
    yield bound
    bound.close()


@pytest.fixture
def text() -> str:
    """Never sent before, and some ten blocks long."""
    return f"Note {secrets.token_hex(16)}: " + "the member was seen twice, and the second visit is in question. " * 8


@pytest.fixture
def places() -> Places:
    case = f"c-{secrets.token_hex(8)}"
    return Places(Place("alpha", case), Place("alpha", f"{case}-other"), Place("beta", case), Place("alpha", None))


def ids_of(text: str, count: int, vocab_size: int = 40_000) -> list[int]:
    """Token ids that two texts do not begin alike with."""
    drawn = hashlib.shake_128(text.encode()).digest(4 * count)
    first = 1000 if vocab_size > 1000 else 0  # past the control tokens
    return [
        first + int.from_bytes(drawn[4 * index : 4 * index + 4], "little") % (vocab_size - first)
        for index in range(count)
    ]


def assert_hit(path: Path, place: Place, text: str) -> None:
    again = path.send(place, text)
    least, most = path.expected(again, text)
    assert 0 < least <= again.reused <= most, again


def assert_missed(path: Path, place: Place, found: Found) -> None:
    assert found.reused <= path.own(place, found), f"found from {place.zone}: {found}"


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_the_same_zone_hits(path: Path, places: Places, text: str) -> None:
    assert_missed(path, places.home, path.begin(places.home, text))
    assert_hit(path, places.home, text)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_another_zone_misses(path: Path, places: Places, text: str) -> None:
    path.begin(places.home, text)
    for other in places.others:
        assert_missed(path, other, path.send(other, text))
        assert_hit(path, other, text)
        assert_hit(path, places.home, text)


@pytest.mark.parametrize("path", paths_without(ALWAYS_IN_A_CASE), indirect=True)
def test_what_has_no_zone_is_never_kept(path: Path, places: Places, text: str) -> None:
    path.begin(places.home, text)
    for _ in range(2):
        found = path.send(places.nowhere, text)
        assert found.reused == 0, found
    assert_hit(path, places.home, text)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_after_a_purge_the_same_zone_misses_and_another_still_hits(path: Path, places: Places, text: str) -> None:
    for place in (places.home, places.other_case):
        path.begin(place, text)
    path.purge(places.home, text)
    assert_missed(path, places.home, path.send(places.home, text))
    assert_hit(path, places.other_case, text)


@pytest.mark.parametrize("path", paths_without(WITHOUT_EPOCHS), indirect=True)
def test_a_zone_that_was_purged_hits_again_once_it_is_computed(path: Path, places: Places, text: str) -> None:
    path.begin(places.home, text)
    for _ in range(2):
        path.purge(places.home, text)
        path.begin(places.home, text)
        assert_hit(path, places.home, text)
