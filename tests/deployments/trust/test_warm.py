"""Shared texts are resident because a manifest lists them, whatever traffic does, and for no other reason."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from deployments import reviews
from deployments.claims.model import text_sha256
from deployments.claims.plan import load_plan
from deployments.claims.prompt import assemble, shared_segments
from deployments.config import TrustSection
from deployments.engine_host import EngineHost, EngineStopped
from deployments.generation import TokenisedPrompt
from deployments.metrics import IngressMetrics
from deployments.prompts import ZonedMessage, ZonedText, tokenise_chat
from deployments.trust import warm
from deployments.trust.epochs import EpochStore
from deployments.trust.in_force import InForce
from deployments.trust.manifest import (
    TEXTS_FOLDER,
    Manifest,
    SharedSegment,
    SignedManifest,
    publish,
    rfc3339,
    unix_time,
)
from deployments.trust.manifest_floors import FLOORS_NAME, FloorError, keep_floors
from deployments.trust.manifest_keys import TrustedKey, TrustedKeys, trust
from deployments.trust.manifest_set import ManifestSet
from deployments.trust.policy import DEFAULT_POLICY, PolicyError, load_policy
from deployments.trust.principals import Principal
from deployments.trust.scope import CallScope
from deployments.trust.shareable import publish_shipped
from deployments.trust.trail import AuditTrail
from deployments.trust.warm import REVIEW_ORDER, Head, PoolLimits, Warmer, WarmFailure, WarmPrompt, heads, warm_prompts
from engine.cache_events import CacheEvent
from engine.engine import Engine, RequestOutput
from engine.errors import IntegrityError, PinRefused, QueueFullError
from engine.request import Request
from engine.tokenizer import Tokenizer
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.deployments.claims.builders import claim, line
from tests.deployments.support import Clock, run
from tests.engine.tiny_tokenizer import tiny_tokenizer
from tests.engine.toy_model import BLOCK_SIZE, EOS, ToyEngine, ToyModel, make_request, toy_hasher

GOLD, SILVER = Zone.parse("tenant/acme/plan/gold"), Zone.parse("tenant/acme/plan/silver")
RIVAL = Zone.parse("tenant/rival/plan/gold")
CASE = Zone.parse("tenant/acme/case/c")
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
ZONES = ("public", "tenant/acme/plan/*", "tenant/rival/plan/*", "tenant/local/plan/*")
TRUSTED = TrustedKeys([TrustedKey(KEY.public_key(), ZONES)])
NOW = unix_time("2026-11-24T12:00:00Z")
MAX_MODEL_LEN = 512
TEXTS = {
    PUBLIC: {"system": "You review claims. Answer with one JSON object. "},
    GOLD: {"rubric": "Pay what is due. ", "policies": "S1 Visits. A referral comes before the visit."},
}


def signed(zone: Zone, texts: dict[str, str], revision: int = 1) -> SignedManifest:
    return SignedManifest(listing(zone, texts, revision), "key", f"{zone.path} {revision}")


def listing(zone: Zone, texts: dict[str, str], revision: int = 1, expires: float = NOW + 1000) -> Manifest:
    return Manifest(
        zone=zone.path,
        revision=revision,
        approver="Office",
        effective=rfc3339(NOW - 10),
        expires=rfc3339(expires),
        segments=tuple(SharedSegment(id=name, sha256=text_sha256(text), title=name) for name, text in texts.items()),
    )


def toy_chat_tokenizer() -> Tokenizer:
    """The toy model's tokens, a letter each, and a chat template of letters."""
    spell = {chr(code): "Ġ" if code == 0x20 else chr(code) for code in range(0x20, 0x7F)}
    backend = Backend(models.BPE(vocab={text: index for index, text in enumerate(spell.values())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}[assistant]"
    return Tokenizer(backend, eos_token_ids=(EOS,), chat_template=template)


class Site:
    """A folder of manifests with the texts beside them, a policy, and one replica's warmer."""

    def __init__(
        self, path: Path, tokenizer: Tokenizer, *, block_size: int = BLOCK_SIZE, num_blocks: int = 256
    ) -> None:
        self.folder, self.keys, self.policy = path / "manifests", path / "trusted.yaml", path / "policy.yaml"
        self.state = path / "epochs.json"
        self.folder.mkdir()
        trust(self.keys, KEY.public_key(), ZONES)
        self.set_strict(False)
        self.clock = Clock(NOW)
        self.epochs = EpochStore(self.state)
        self.failures: list[WarmFailure] = []
        self.tokenizer, self.block_size, self.num_blocks = tokenizer, block_size, num_blocks
        self.warmer = self.replica()

    def replica(self, *, max_model_len: int = MAX_MODEL_LEN, **settings: object) -> Warmer:
        """A warmer as a replica that starts now makes it."""
        num_blocks = settings.pop("num_blocks", self.num_blocks)
        assert isinstance(num_blocks, int)
        defaults: dict[str, object] = {
            "policy_file": self.policy,
            "manifests_dir": self.folder,
            "manifest_keys_file": self.keys,
            "prewarm_share": 1.0,
        }
        config = TrustSection.model_validate({"keys_file": Path("unused"), **defaults, **settings})
        return Warmer(
            config,
            self.tokenizer,
            block_size=self.block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            epochs=EpochStore(self.state),
            on_failure=self.failures.append,
            clock=self.clock,
        )

    def set_strict(self, strict: bool) -> None:
        text = DEFAULT_POLICY.read_text(encoding="utf-8")
        self.policy.write_text(text.replace("strict: false", f"strict: {str(strict).lower()}"), encoding="utf-8")

    def put(self, zone: Zone, texts: dict[str, str], revision: int = 1, expires: float = NOW + 1000) -> Path:
        return publish(self.folder, listing(zone, texts, revision, expires), KEY, texts=texts.values())

    def text_file(self, text: str) -> Path:
        return self.folder / TEXTS_FOLDER / text_sha256(text)

    def wanted(self, warmer: Warmer | None = None, floors: dict[Zone, int] | None = None) -> dict[str, WarmPrompt]:
        """What an engine that keeps nothing is to compute, by its text."""
        chosen = warmer or self.warmer
        chosen.reload()
        plan = chosen.look((), floors)
        assert plan.to_drop == ()
        return {self.tokenizer.decode(list(prompt.token_ids)): prompt for prompt in plan.to_add}

    def shared_zones(self) -> list[str]:
        """Of each wanted prompt, the zone of its end."""
        return [prompt.zone_spans[-1].zone.path for prompt in self.wanted().values()]

    def ask(self, request_id: str) -> Request:
        """A review as the ingress sends it: labelled by the manifests in force, stamped with the epochs."""
        loaded = ManifestSet(self.folder, TRUSTED, self.clock)
        loaded.reload()
        in_force = loaded.in_force()
        known = EpochStore(self.state)
        case = Zone.parse(f"tenant/acme/case/{request_id}")

        def text(zone: Zone, name: str) -> ZonedText:
            content = TEXTS[zone][name]
            is_listed = zone in in_force and text_sha256(content) in in_force[zone].content_digests
            return ZonedText(content, zone if is_listed else case)

        system = (text(PUBLIC, "system"), text(GOLD, "rubric"), text(GOLD, "policies"))
        messages = [ZonedMessage("system", system), ZonedMessage("user", (ZonedText("Claim 7.", case),))]
        prompt = tokenise_chat(self.tokenizer, messages, case)
        spans = tuple(ZoneSpan(span.end, span.zone, known.epoch_of(span.zone)) for span in prompt.zone_spans)
        return make_request(request_id, prompt.token_ids, spans, max_tokens=2)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, toy_chat_tokenizer())


def toy_engine(site: Site, **config: Any) -> ToyEngine:
    return ToyEngine(site.num_blocks, max_model_len=MAX_MODEL_LEN, **config)


def publish_all(site: Site) -> None:
    for zone, texts in TEXTS.items():
        site.put(zone, texts)


def num_shared_blocks(request: Request) -> int:
    """Whole blocks of a prompt that lie in public or in a plan."""
    shared = [span.end for span in request.zone_spans if span.zone in (PUBLIC, GOLD)]
    return max(shared, default=0) // BLOCK_SIZE


# --- which texts, in which order ---


def test_reviews_begin_with_the_texts_that_are_warmed_in_their_order() -> None:
    segments = shared_segments("local", load_plan("synthetic-ppo"))
    assert tuple(segment.id for segment in segments) == REVIEW_ORDER
    assert {segment.role for segment in segments} == {"system"}


def test_most_shared_texts_come_first() -> None:
    public = {"notice": "n", "system": "s"}
    gold = {"glossary": "g", "policies": "p", "rubric": "r"}
    in_force = {SILVER: signed(SILVER, {"rubric": "r"}), GOLD: signed(GOLD, gold), PUBLIC: signed(PUBLIC, public)}
    digest = {text: text_sha256(text) for text in "nsgpr"}
    assert heads(in_force, is_strict=False) == (
        Head(((PUBLIC, digest["n"]),), is_whole=True),
        Head(((PUBLIC, digest["s"]),), is_whole=False),  # a plan's texts follow it in the same message
        Head(((PUBLIC, digest["s"]), (GOLD, digest["r"]), (GOLD, digest["p"])), is_whole=True),
        Head(((PUBLIC, digest["s"]), (SILVER, digest["r"])), is_whole=False),
        Head(((GOLD, digest["g"]),), is_whole=True),
    )


def test_strict_warms_public_text_in_the_plans_zone_only() -> None:
    in_force = {PUBLIC: signed(PUBLIC, {"system": "s", "notice": "n"}), GOLD: signed(GOLD, {"rubric": "r", "x": "x"})}
    assert heads(in_force, is_strict=True) == (
        Head(((GOLD, text_sha256("s")), (GOLD, text_sha256("r"))), is_whole=False),
        Head(((GOLD, text_sha256("x")),), is_whole=True),
    )


@pytest.mark.parametrize("is_strict", [False, True])
def test_texts_behind_one_that_is_not_listed_belong_to_no_review(is_strict: bool) -> None:
    policies = signed(GOLD, {"policies": "p"})
    alone = Head(((GOLD, text_sha256("p")),), is_whole=True)
    assert heads({GOLD: policies}, is_strict=is_strict) == (alone,)
    with_system = heads({PUBLIC: signed(PUBLIC, {"system": "s"}), GOLD: policies}, is_strict=is_strict)
    assert with_system[-1] == alone
    assert len(with_system) == (1 if is_strict else 2)


# --- the warmed blocks are those of a prompt ---


def zones_by_block(prompt: WarmPrompt | TokenisedPrompt, num_blocks: int, block_size: int) -> list[Zone]:
    request = Request("r", prompt.token_ids, make_request("x", [1]).sampling, zone_spans=prompt.zone_spans)
    return [request.zone_of_block(index, block_size) for index in range(num_blocks)]


def review_prompt(tokenizer: Tokenizer, in_force: InForce, *lines: object, **values: object) -> TokenisedPrompt:
    """As the ingress makes it: assembled, labelled, permitted, tokenised."""
    prompt = assemble(claim(*lines, **values), (), (), tenant="local", plan=load_plan("synthetic-ppo"))  # type: ignore[arg-type]
    principal = Principal("ann", "local", EPHEMERAL)
    scope = CallScope(principal, "r", in_force, AuditTrail(None), IngressMetrics())
    return reviews.tokenise(tokenizer, prompt, scope.label(prompt))


@pytest.mark.model
@pytest.mark.parametrize("is_strict", [False, True])
def test_a_real_review_finds_every_warmed_block_and_shares_no_other(
    is_strict: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    block_size = 16
    site = Site(tmp_path, tokenizer, block_size=block_size, num_blocks=1024)
    site.set_strict(is_strict)
    publish_shipped(
        site.folder, KEY, TRUSTED, tenant="local", plans=["synthetic-ppo"], approver="zoneserve", now=NOW - 1
    )
    prompts = list(site.wanted(site.replica(max_model_len=8192)).values())
    assert site.failures == []
    assert [prompt.zone_spans[-1].zone.path for prompt in prompts] == (
        ["tenant/local/plan/synthetic-ppo"] if is_strict else ["public", "tenant/local/plan/synthetic-ppo"]
    )
    loaded = ManifestSet(site.folder, TRUSTED, site.clock)
    assert loaded.reload() == ()
    in_force = InForce(load_policy(site.policy), loaded.in_force())
    for lines, values in [
        ((), {}),
        ((line(1, "97110", units=4), line(2, "J1885")), {"claim_id": "0-Z", "received_date": date(2026, 11, 1)}),
    ]:
        review = review_prompt(tokenizer, in_force, *lines, **values)
        ends = {span.zone.kind.name: span.end for span in review.zone_spans}
        by_zone = dict(zip(["PLAN"] if is_strict else ["PUBLIC", "PLAN"], prompts, strict=True))
        for kind, prompt in by_zone.items():
            num_blocks = prompt.num_blocks
            assert prompt.token_ids == review.token_ids[: num_blocks * block_size]
            assert zones_by_block(prompt, num_blocks, block_size) == zones_by_block(review, num_blocks, block_size)
            assert num_blocks == ends[kind] // block_size


TOKEN_BLOCKS = PoolLimits(block_size=1, max_blocks=10_000, max_model_len=10_000)  # each token counts
ENDINGS = ("", "\n", ".\n\n", " ", "<", "é")
STARTS = st.builds(str.__add__, st.sampled_from(["", " ", "\n", "\n\n", "\n "]), st.text(min_size=1, max_size=8))
WORDS = st.lists(st.sampled_from(["claim", "the", " reviewer", "\n", "12", "pay ", "ü", "<|im_end|>", "."]), min_size=1)


@pytest.mark.model
@given(words=st.lists(WORDS.map("".join), min_size=2, max_size=2), ending=st.sampled_from(ENDINGS), case_text=STARTS)
@settings(max_examples=40)
def test_blocks_of_texts_that_end_the_message_are_those_of_any_prompt_with_them(
    words: list[str], ending: str, case_text: str, tokenizer: Tokenizer
) -> None:
    texts = ((PUBLIC, words[0]), (GOLD, words[1] + ending))
    kept = {text_sha256(text): text for _, text in texts}
    head = Head(tuple((zone, text_sha256(text)) for zone, text in texts), is_whole=True)
    prompts, _ = warm_prompts([head], text_of=kept.get, epoch_of=lambda _: 0, tokenizer=tokenizer, pool=TOKEN_BLOCKS)
    shared = tuple(ZonedText(text, zone) for zone, text in texts)
    user = ZonedMessage("user", (ZonedText(case_text, CASE),))
    asked = tokenise_chat(tokenizer, [ZonedMessage("system", shared), user], CASE)
    for prompt in prompts:
        assert prompt.token_ids == asked.token_ids[: len(prompt.token_ids)]
        assert zones_by_block(prompt, prompt.num_blocks, 1) == zones_by_block(asked, prompt.num_blocks, 1)
        assert {span.zone for span in prompt.zone_spans} <= {PUBLIC, GOLD}
        assert prompt.num_blocks == len(prompt.token_ids) == prompt.zone_spans[-1].end


@pytest.mark.model
@given(text=WORDS.map("".join), following=STARTS)
@settings(max_examples=40)
def test_blocks_of_a_text_that_others_follow_are_those_of_any_continuation_on_a_new_line(
    text: str, following: str, tokenizer: Tokenizer
) -> None:
    text += ".\n"
    head = Head(((PUBLIC, text_sha256(text)),), is_whole=False)
    prompts, _ = warm_prompts(
        [head], text_of=lambda _: text, epoch_of=lambda _: 0, tokenizer=tokenizer, pool=TOKEN_BLOCKS
    )
    system = ZonedMessage("system", (ZonedText(text, PUBLIC), ZonedText(following, GOLD)))
    asked = tokenise_chat(tokenizer, [system, ZonedMessage("user", (ZonedText("x", CASE),))], CASE)
    for prompt in prompts:
        assert prompt.token_ids == asked.token_ids[: len(prompt.token_ids)]
        assert zones_by_block(prompt, prompt.num_blocks, 1) == zones_by_block(asked, prompt.num_blocks, 1)


def test_request_publishes_nothing_behind_the_shared_blocks() -> None:
    prompt = WarmPrompt("warm-x", (5, 6, 7, 8), (ZoneSpan(2, PUBLIC, 3), ZoneSpan(4, GOLD, 1)), num_blocks=1)
    request = prompt.request()
    assert request.zone_spans == (*prompt.zone_spans, ZoneSpan(5, EPHEMERAL))
    assert (request.zone_of_block(0, 4), request.epoch_of(GOLD), request.epoch_of(PUBLIC)) == (GOLD, 1, 3)
    assert (request.zone, request.tenant, request.is_prefill_only) == (EPHEMERAL, "acme", True)


# --- what is not warmed, and what is said of it ---


def test_text_whose_digest_does_not_match_is_never_warmed(site: Site) -> None:
    publish_all(site)
    text = TEXTS[GOLD]["policies"]
    for content in (text + " ", text[:-1], "", "\udcff"):
        site.text_file(text).write_bytes(content.encode("utf-8", "surrogateescape"))
        assert site.shared_zones() == ["public"]
    assert site.failures == [WarmFailure.NO_TEXT]  # once while it lasts
    site.text_file(text).write_text(text)
    assert site.shared_zones() == ["public", GOLD.path]
    site.warmer = site.replica()
    site.text_file(text).unlink()
    assert site.shared_zones() == ["public"]
    assert site.failures == [WarmFailure.NO_TEXT] * 2


def test_manifest_of_a_stranger_or_with_a_changed_byte_warms_nothing(site: Site) -> None:
    path = site.put(PUBLIC, TEXTS[PUBLIC])
    path.write_bytes(path.read_bytes().replace(b"Office", b"Offica"))
    texts = TEXTS[GOLD]
    publish(site.folder, listing(GOLD, texts), Ed25519PrivateKey.from_private_bytes(b"s" * 32), texts=texts.values())
    assert site.wanted() == {}
    assert site.failures == []  # the ingress tells of manifests


def test_text_too_short_for_a_block_and_too_long_for_the_model_is_not_warmed(site: Site) -> None:
    site.block_size = 64
    site.put(PUBLIC, {"short": "s", "long": "x" * 500, "fits": "y" * 100})
    (prompt,) = site.wanted(site.replica(max_model_len=500)).values()
    assert prompt.num_blocks == 1
    assert sorted(site.failures) == [WarmFailure.NO_BLOCK, WarmFailure.TOO_LONG]


def test_template_that_refuses_or_hides_a_system_message_warms_nothing(tmp_path: Path) -> None:
    for name, template in (
        ("refuses", "{{ raise_exception('no system message') }}"),
        ("hides", "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"),
    ):
        (tmp_path / name).mkdir()
        site = Site(tmp_path / name, tiny_tokenizer(chat_template=template))
        site.put(PUBLIC, {"system": "Answer with one object. " * 4})
        assert site.wanted() == {}
        assert site.failures == [WarmFailure.FAILED if name == "refuses" else WarmFailure.NO_BLOCK]


def test_prompts_hold_at_most_the_pools_share_most_shared_first(site: Site) -> None:
    site.put(PUBLIC, {"system": "s" * 40 + " "})
    site.put(GOLD, {"rubric": "r" * 400})
    site.put(SILVER, {"rubric": "r" * 12})
    everything = site.wanted(site.replica())
    sizes = [prompt.num_blocks for prompt in everything.values()]
    assert sizes[0] < sizes[2] < sizes[1]
    # What silver adds to the public blocks that it begins with.
    budget = sizes[2]
    assert site.failures == []
    warmer = site.replica(prewarm_share=(budget + 0.5) / site.num_blocks)
    assert list(site.wanted(warmer)) == list(everything)[::2]
    assert site.failures == [WarmFailure.NO_ROOM]
    assert list(site.wanted(site.replica(prewarm_share=(budget - 0.5) / site.num_blocks))) == list(everything)[:1]
    assert site.wanted(site.replica(prewarm_share=0.0)) == {}
    room_for_all = MAX_MODEL_LEN // BLOCK_SIZE + budget
    assert list(site.wanted(site.replica(num_blocks=room_for_all))) == list(everything)[::2]
    assert list(site.wanted(site.replica(num_blocks=room_for_all - 1))) == list(everything)[:1]


@given(st.lists(st.tuples(st.text("ab", max_size=12), st.text("ab", max_size=40)), max_size=6), st.integers(0, 40))
@settings(max_examples=40)
def test_room_is_never_exceeded_and_never_refused_to_the_first_that_fits(
    texts: list[tuple[str, str]], max_blocks: int
) -> None:
    kept = {text_sha256(text): text for pair in texts for text in pair}
    wanted = [
        Head(((PUBLIC, text_sha256(one)), (GOLD, text_sha256(other))), is_whole=True) for one, other in texts
    ]  # fmt: skip
    tokenizer = toy_chat_tokenizer()
    pool = PoolLimits(BLOCK_SIZE, max_blocks, 4096)
    prompts, failures = warm_prompts(
        wanted, text_of=kept.get, epoch_of=lambda _: 0, tokenizer=tokenizer, pool=pool
    )  # fmt: skip
    resident = {
        (prompt.token_ids[: (index + 1) * BLOCK_SIZE], tuple(zones_by_block(prompt, index + 1, BLOCK_SIZE)))
        for prompt in prompts
        for index in range(prompt.num_blocks)
    }
    assert len(resident) <= max_blocks
    assert {reason for reason, _ in failures} <= {WarmFailure.NO_ROOM}
    unbounded, _ = warm_prompts(
        wanted, text_of=kept.get, epoch_of=lambda _: 0, tokenizer=tokenizer, pool=PoolLimits(BLOCK_SIZE, 10_000, 4096)
    )
    if unbounded and unbounded[0].num_blocks <= max_blocks:
        assert prompts[0] == unbounded[0]
    assert not failures or len(resident) + max(prompt.num_blocks for prompt in unbounded) > max_blocks


def test_more_prompts_than_the_limit_are_refused_unread(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MAX_WARM_PROMPTS", 2)
    site.put(PUBLIC, {f"t{number}": f"Text number {number}." for number in range(4)})
    site.text_file("Text number 3.").unlink()
    assert len(site.wanted()) == 2
    assert site.failures == [WarmFailure.NO_ROOM] * 2


# --- over time ---


def test_withdrawn_superseded_and_expired_manifests_are_dropped(site: Site) -> None:
    site.put(PUBLIC, TEXTS[PUBLIC], expires=NOW + 100)
    gold = site.put(GOLD, TEXTS[GOLD])
    names = [prompt.name for prompt in site.wanted().values()]
    assert len(names) == 2
    site.put(GOLD, TEXTS[GOLD] | {"rubric": "Pay nothing. "}, revision=2)
    site.warmer.reload()
    plan = site.warmer.look(names)
    assert plan.to_drop == (names[1],)
    assert len(plan.to_add) == 1
    names[1] = plan.to_add[0].name
    for path in site.folder.glob("*gold*.json"):
        path.unlink()
    assert not gold.exists()
    site.warmer.reload()
    assert site.warmer.look(names).to_drop == (names[1],)
    site.clock.now = NOW + 100
    assert site.warmer.look(names).to_drop == tuple(sorted(names))  # without a look at the files


def test_manifest_older_than_one_that_was_in_force_is_not_warmed_after_a_restart(site: Site, tmp_path: Path) -> None:
    newer = site.put(GOLD, {"glossary": "The newer text."}, revision=2)
    loaded = ManifestSet(site.folder, TRUSTED, site.clock)
    loaded.reload()
    keep_floors(tmp_path / FLOORS_NAME, loaded.floors, lambda *_: True)
    assert len(site.wanted(site.replica(state_dir=tmp_path))) == 1
    newer.unlink()
    site.put(GOLD, {"glossary": "The older text."}, revision=1)
    assert len(site.wanted(site.replica())) == 1
    assert site.wanted(site.replica(state_dir=tmp_path)) == {}
    (tmp_path / FLOORS_NAME).write_text("{")
    with pytest.raises(FloorError):
        site.replica(state_dir=tmp_path)


def test_what_is_pinned_already_and_what_others_pinned_is_left_alone(site: Site) -> None:
    publish_all(site)
    names = [prompt.name for prompt in site.wanted().values()]
    plan = site.warmer.look([*names, "operator-1"])
    assert (plan.to_add, plan.to_drop) == ((), ())


def test_replica_that_is_not_to_prewarm_keeps_nothing(site: Site) -> None:
    publish_all(site)
    names = [prompt.name for prompt in site.wanted().values()]
    for warmer in (site.replica(prewarm=False), site.replica(manifests_dir=None, manifest_keys_file=None)):
        assert warmer.reload() == frozenset()
        assert warmer.look(names).to_drop == tuple(sorted(names))
        assert warmer.look().to_add == ()


def test_policy_that_becomes_strict_moves_public_text_to_the_plans(site: Site) -> None:
    publish_all(site)
    before = {prompt.name for prompt in site.wanted().values()}
    site.set_strict(True)
    site.warmer.reload()
    plan = site.warmer.look(before)
    assert set(plan.to_drop) == before
    assert [{span.zone for span in prompt.zone_spans} for prompt in plan.to_add] == [{GOLD}]


def test_broken_files_leave_what_was_good(site: Site) -> None:
    publish_all(site)
    before = site.wanted()
    site.policy.write_text("strict: true\n")
    site.keys.write_text("{")
    assert site.wanted() == before
    site.keys.unlink()
    assert site.wanted() == before
    assert site.wanted(site.replica(policy_file=None)) == {}  # nobody is trusted by one that starts now
    with pytest.raises(PolicyError):
        site.replica()


def test_purged_zone_is_not_warmed_again_before_another_manifest_or_a_restart(site: Site) -> None:
    publish_all(site)
    names = [prompt.name for prompt in site.wanted().values()]
    site.epochs.raise_epoch(GOLD)
    site.warmer.reload()
    plan = site.warmer.look(names)
    assert (plan.to_add, plan.to_drop) == ((), (names[1],))
    assert site.shared_zones() == ["public"]  # the engine keeps it no longer: it stays away all the same
    assert len(site.wanted(site.replica())) == 2
    site.put(GOLD, TEXTS[GOLD], revision=2)  # the same texts, published anew
    again = list(site.wanted().values())
    assert [span.epoch for span in again[1].zone_spans if span.zone == GOLD] == [1]
    assert again[0].name == names[0]
    assert again[1].name != names[1]
    site.epochs.raise_epoch(GOLD)
    assert site.shared_zones() == ["public"]


def test_purge_of_public_takes_every_prompt_that_begins_with_it(site: Site) -> None:
    publish_all(site)
    site.put(RIVAL, {"notice": "A notice of its own."})
    assert site.shared_zones() == ["public", GOLD.path, RIVAL.path]
    site.epochs.raise_epoch(PUBLIC)
    assert site.shared_zones() == [RIVAL.path]


def test_purge_that_only_the_engine_knows_of_counts(site: Site) -> None:
    publish_all(site)
    assert len(site.wanted(floors={GOLD: 0, PUBLIC: 0})) == 2
    (prompt,) = site.wanted(floors={GOLD: 1, PUBLIC: 0}).values()
    assert prompt.zone_spans[-1].zone == PUBLIC


# --- with an engine ---


def check_served(engine: ToyEngine, request: Request) -> int:
    """Run it; its answer must be the model's. Returns how many prompt tokens were found."""
    engine.run(request)
    assert engine.tokens(request.request_id) == ToyModel.continuation(request.prompt_token_ids, 2, ignore_eos=True)
    return engine.last(request.request_id).num_cached_tokens


def flood(engine: ToyEngine) -> None:
    """More at once of the tenant's own cases than the pool holds: nothing else of the tenant's can stay."""
    before = engine.stats().evictions
    names = [f"flood-{before}-{number}" for number in range(2)]
    prompts = [[(7 * number + at) % 90 for at in range(472)] for number in range(2)]
    zones = [Zone.parse(f"tenant/acme/case/{name}") for name in names]
    engine.run(*(make_request(*parts, max_tokens=2) for parts in zip(names, prompts, zones, strict=True)))
    assert engine.stats().evictions > before


@pytest.fixture
def warmed(site: Site) -> tuple[Site, ToyEngine]:
    engine = toy_engine(site)
    publish_all(site)
    site.warmer.warm_engine(engine)
    engine.check()
    return site, engine


def test_first_review_finds_every_shared_block(warmed: tuple[Site, ToyEngine]) -> None:
    site, engine = warmed
    assert len(engine.pinned()) == 2
    request = site.ask("r")
    assert check_served(engine, request) == num_shared_blocks(request) * BLOCK_SIZE > 0
    assert engine.stats().held == engine.stats().running == 0


def test_residency_does_not_depend_on_traffic(warmed: tuple[Site, ToyEngine]) -> None:
    site, engine = warmed
    flood(engine)
    request = site.ask("r")
    assert check_served(engine, request) == num_shared_blocks(request) * BLOCK_SIZE


def test_without_pins_the_same_flood_evicts_what_a_review_would_find(site: Site) -> None:
    """The control: the flood is large enough."""
    engine = toy_engine(site)
    publish_all(site)
    check_served(engine, site.ask("first"))
    flood(engine)
    request = site.ask("r")
    assert check_served(engine, request) < num_shared_blocks(request) * BLOCK_SIZE


def test_second_look_computes_nothing(warmed: tuple[Site, ToyEngine]) -> None:
    site, engine = warmed
    before = engine.stats().computed_tokens
    site.warmer.warm_engine(engine)
    assert engine.stats().computed_tokens == before


def test_texts_that_traffic_has_cached_already_are_pinned_whole(site: Site) -> None:
    engine = toy_engine(site)
    publish_all(site)
    check_served(engine, site.ask("first"))
    site.warmer.warm_engine(engine)
    assert site.failures == []
    assert engine.stats().blocks_pinned == num_shared_blocks(site.ask("r"))


def test_withdrawn_text_is_unpinned_and_found_no_more(warmed: tuple[Site, ToyEngine]) -> None:
    site, engine = warmed
    for path in site.folder.glob("*.json"):
        path.unlink()
    site.warmer.warm_engine(engine)
    engine.check()
    assert engine.pinned() == ()
    assert engine.stats().blocks_pinned == 0
    assert engine.stats().blocks_free == site.num_blocks


def test_after_a_purge_the_same_review_is_a_miss_and_a_new_publication_warms_it(
    warmed: tuple[Site, ToyEngine],
) -> None:
    site, engine = warmed
    for zone in (GOLD, PUBLIC):
        engine.purge(zone.path, site.epochs.raise_epoch(zone))
    site.warmer.warm_engine(engine)
    assert engine.pinned() == ()
    assert check_served(engine, site.ask("after")) == 0
    publish_anew(site)
    site.warmer.warm_engine(engine)
    flood(engine)
    request = site.ask("again")
    assert check_served(engine, request) == num_shared_blocks(request) * BLOCK_SIZE
    assert site.failures == []


def publish_anew(site: Site) -> None:
    for zone, texts in TEXTS.items():
        site.put(zone, texts, revision=2)


def test_after_a_change_of_key_everything_is_warmed_again(warmed: tuple[Site, ToyEngine]) -> None:
    site, engine = warmed
    engine.rekey(toy_hasher(b"n" * 32))
    assert engine.pinned() == ()
    site.warmer.warm_engine(engine)
    request = site.ask("r")
    assert check_served(engine, request) == num_shared_blocks(request) * BLOCK_SIZE


def test_text_in_an_earlier_epoch_than_the_engines_is_not_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A purge between the look and the warming: nothing of the old epoch may stay, and the next look knows."""
    engine = toy_engine(site)
    publish_all(site)
    look = site.warmer.look

    def look_and_purge(*state: object) -> warm.WarmPlan:
        plan = look(*state)  # type: ignore[arg-type]
        engine.purge(GOLD.path, 1)
        return plan

    monkeypatch.setattr(site.warmer, "look", look_and_purge)
    site.warmer.warm_engine(engine)
    assert site.failures == [WarmFailure.FAILED]
    assert len(engine.pinned()) == 1
    monkeypatch.undo()
    site.warmer.warm_engine(engine)
    assert site.failures == [WarmFailure.FAILED]
    engine.check()


@pytest.mark.parametrize(
    ("method", "error", "reason"),
    [
        ("add_request", QueueFullError("full"), WarmFailure.FAILED),
        ("pin", PinRefused("no room"), WarmFailure.NO_ROOM),
    ],
)
def test_prompt_that_the_engine_refuses_is_counted_left_and_tried_again(
    method: str, error: Exception, reason: WarmFailure, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = toy_engine(site)
    publish_all(site)

    def refuse(_: object) -> int:
        raise error

    monkeypatch.setattr(engine, method, refuse)
    site.warmer.warm_engine(engine)
    assert site.failures == [reason] * 2
    assert (engine.pinned(), engine.stats().held, engine.stats().waiting) == ((), 0, 0)
    engine.check()
    monkeypatch.undo()
    site.warmer.warm_engine(engine)
    assert len(engine.pinned()) == 2


def test_fault_of_the_runner_or_of_an_invariant_stops_the_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine(site)
    publish_all(site)
    engine.runner.fault = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="device"):
        site.warmer.warm_engine(engine)
    engine = toy_engine(site)

    def broken(_: object) -> int:
        raise IntegrityError("two owners")

    monkeypatch.setattr(engine, "pin", broken)
    with pytest.raises(IntegrityError):
        site.warmer.warm_engine(engine)


def test_pool_that_is_too_small_for_a_prompt_goes_without(site: Site) -> None:
    site.put(PUBLIC, {"system": "s" * 100})
    engine = ToyEngine(8, max_model_len=30)
    site.warmer.warm_engine(engine)
    assert site.failures == [WarmFailure.FAILED]
    assert engine.stats().blocks_free == 8


# --- beside traffic ---


class Observer:
    def step_took(self, seconds: float) -> None:
        pass

    def request_queued_for(self, request_id: str, seconds: float) -> None:
        pass

    def cache_changed(self, events: list[CacheEvent]) -> None:
        pass


@contextmanager
def hosted(engine: Engine) -> Iterator[EngineHost]:
    host = EngineHost(engine, Observer())
    try:
        yield host
    finally:
        host.stop()


async def outputs_of(host: EngineHost, request: Request) -> list[RequestOutput]:
    stream = host.open(request)
    try:
        await host.add(request)
        return [output async for output in stream]
    finally:
        host.close(request.request_id)


def test_publication_warms_a_running_replica_and_its_traffic_goes_on(site: Site) -> None:
    engine = toy_engine(site)
    other = make_request("traffic", [(7 * at) % 90 for at in range(50)], RIVAL, max_tokens=100)
    expected = ToyModel.continuation(other.prompt_token_ids, 100, ignore_eos=True)

    async def body() -> None:
        with hosted(engine) as host:
            await site.warmer.warm_host(host)
            assert await host.call(lambda running: running.pinned()) == ()
            traffic = asyncio.ensure_future(outputs_of(host, other))
            publish_all(site)
            await site.warmer.warm_host(host)
            assert len(await host.call(lambda running: running.pinned())) == 2
            tokens = [token for output in await traffic for token in output.token_ids]
            assert tokens == expected
            request = site.ask("r")
            assert (await outputs_of(host, request))[-1].num_cached_tokens == num_shared_blocks(request) * BLOCK_SIZE
            for path in site.folder.glob("*gold*.json"):
                path.unlink()
            await site.warmer.warm_host(host)
            assert len(await host.call(lambda running: running.pinned())) == 1
            assert host._streams == {}

    run(body)
    engine.check()
    assert site.failures == []
    assert engine.stats().held == 0


def test_prompt_that_fails_beside_traffic_is_counted_and_leaves_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = toy_engine(site)
    publish_all(site)

    def refuse(_: str) -> int:
        raise PinRefused("no room")

    async def body() -> None:
        with hosted(engine) as host:
            monkeypatch.setattr(engine, "pin", refuse)
            await site.warmer.warm_host(host)
            monkeypatch.undo()
            assert (await host.call(lambda running: running.stats())).held == 0
            await site.warmer.warm_host(host)
            assert len(await host.call(lambda running: running.pinned())) == 2

    run(body)
    assert site.failures == [WarmFailure.NO_ROOM] * 2


def test_prompt_that_finds_no_seat_in_time_gives_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "WARM_TIMEOUT_S", 0.05)
    engine = toy_engine(site, max_num_seqs=1)
    site.put(PUBLIC, TEXTS[PUBLIC])

    async def body() -> None:
        with hosted(engine) as host:
            seat = make_request("seat", [1, 2, 3], RIVAL)
            assert await host.call(lambda running: running.reserve(seat)) is not None
            await site.warmer.warm_host(host)
            assert site.failures == [WarmFailure.FAILED]
            assert (await host.call(lambda running: running.stats())).waiting == 0
            await host.call(lambda running: running.abort("seat"))
            await host.call(lambda running: running.release_quarantine("seat"))
            await site.warmer.warm_host(host)
            assert len(await host.call(lambda running: running.pinned())) == 1

    run(body)


def test_engine_that_has_stopped_ends_the_warming(site: Site) -> None:
    publish_all(site)

    async def body() -> None:
        with hosted(toy_engine(site)) as host:
            host.stop()
            with pytest.raises(EngineStopped):
                await site.warmer.warm_host(host)

    run(body)


def test_warming_that_is_cancelled_holds_nothing(site: Site) -> None:
    engine = toy_engine(site, max_num_seqs=1)
    publish_all(site)

    async def body() -> None:
        with hosted(engine) as host:
            seat = make_request("seat", [1, 2, 3], RIVAL)
            assert await host.call(lambda running: running.reserve(seat)) is not None
            task = asyncio.ensure_future(site.warmer.warm_host(host))
            async with asyncio.timeout(5):
                while not (await host.call(lambda running: running.stats())).waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stats = await host.call(lambda running: running.stats())
            assert (stats.waiting, stats.held, stats.blocks_pinned) == (0, 0, 0)

    run(body)
