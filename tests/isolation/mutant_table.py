"""The mutants: at each hop where a zone is enforced, what the code would be without it, and the tests that notice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Hop(StrEnum):
    """Where a zone is enforced on its own; see docs/architecture.md."""

    INGRESS = "ingress"
    POLICY = "policy"
    MANIFEST = "manifests"
    LABELS = "labels"
    ROUTER = "router"
    SCHEDULER = "scheduler"
    DIGEST = "block digest"
    POOL = "block pool"
    SCRUB = "scrubbing"
    TICKET = "P/D ticket"
    LANDING = "landing"
    PREFILL = "prefill admission"
    DECODE = "decode admission"
    GRANT = "zone grant"
    PURGE = "purge"
    EVICTION = "eviction"
    REPORT = "what is told"


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `old` stands there exactly once; each of `tests` must fail once it is `new`."""

    name: str
    hop: Hop
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """A module that comes from where the file does."""
        if self.file.endswith(".py"):
            return self.file.removesuffix(".py").replace("/", ".")
        return self.file.partition("/")[0]

    def apply(self, source: str) -> str:
        """
        Raises:
            ValueError: `old` does not stand in the source exactly once.
        """
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text stands {source.count(self.old)} times in {self.file}")
        return source.replace(self.old, self.new)


_HASH, _POOL = "tests/engine/test_block_hash.py", "tests/engine/test_block_pool.py"
_CACHE, _ENGINE = "tests/engine/test_kv_cache_manager.py", "tests/engine/test_engine.py"
_ZONE, _REQUEST = "tests/engine/test_zone.py", "tests/engine/test_request.py"
_TICKET, _HANDOFF = "tests/transfer/test_ticket.py", "tests/transfer/test_handoff.py"
_SIM, _BOUNDARIES = "tests/sim/test_handoff_scenarios.py", "tests/sim/test_zone_boundaries.py"
_ZONE_CACHE = "tests/engine/test_zone_cache.py"
_TRUST = "tests/deployments/trust"
_PROPERTIES = "tests/isolation/test_properties.py"
_FINDS = f"{_PROPERTIES}::test_an_engine_finds_only_blocks_whose_tokens_zones_and_epochs_all_agree"

_DIGEST = (
    Mutant(
        "digest_without_zone", Hop.DIGEST, "engine/block_hash.py",
        "        path = zone.path\n",
        '        path = "public"\n',
        (f"{_CACHE}::test_two_zones_share_nothing_though_the_text_is_the_same",),
    ),
    Mutant(
        "digest_without_epoch", Hop.DIGEST, "engine/block_hash.py",
        "self._zone_key(path, epoch)",
        "self._zone_key(path, 0)",
        (f"{_CACHE}::test_another_epoch_is_a_miss_for_the_own_zone_and_a_hit_for_wider_ones",),
    ),
    Mutant(
        "digest_without_master_key", Hop.DIGEST, "engine/block_hash.py",
        "derive_key(master_key, b\"zone|\"",
        "derive_key(b\"\", b\"zone|\"",
        (f"{_HASH}::test_another_master_key_gives_another_digest",
         f"{_PROPERTIES}::test_every_bit_of_the_master_key_counts"),
    ),
    Mutant(
        "digest_without_context", Hop.DIGEST, "engine/block_hash.py",
        " + self._context\n",
        "\n",
        (f"{_HASH}::test_any_change_of_the_context_changes_the_digest",),
    ),
    Mutant(
        "digest_without_parent", Hop.DIGEST, "engine/block_hash.py",
        "message = _prefixed(parent) + ",
        "message = ",
        (f"{_PROPERTIES}::test_a_change_in_an_early_block_changes_the_digest_of_every_later_one",
         f"{_CACHE}::test_the_same_tokens_after_another_beginning_are_no_hit"),
    ),
)  # fmt: skip

_SCHEDULER = (
    Mutant(
        "block_of_the_zone_of_its_first_token", Hop.SCHEDULER, "engine/request.py",
        "return self._zone_of_token((index + 1) * block_size - 1)",
        "return self._zone_of_token(index * block_size)",
        (f"{_CACHE}::test_a_mixed_prompt_shares_exactly_its_public_and_plan_prefix",
         f"{_PROPERTIES}::test_a_block_over_a_change_of_zone_is_as_private_as_all_its_tokens_and_all_before_it"),
    ),
    Mutant(
        "unlabelled_tail_of_a_prompt_in_the_last_zone", Hop.SCHEDULER, "engine/request.py",
        "        if labelled <= index and labelled < len(self.prompt_token_ids):\n",
        "        if not labelled:\n",
        (f"{_REQUEST}::test_prompt_tokens_past_the_last_span_are_ephemeral",),
    ),
    Mutant(
        "zone_of_the_last_span_alone", Hop.SCHEDULER, "engine/zone.py",
        "        joined = joined.join(span.zone)\n",
        "        joined = span.zone\n",
        (f"{_ZONE}::test_a_later_span_that_is_wider_does_not_widen_the_zone",),
    ),
    Mutant(
        "two_cases_join_in_the_first", Hop.SCHEDULER, "engine/zone.py",
        "return Zone(ZoneKind.MIXED, low.tenant) if low.kind is ZoneKind.PLAN else EPHEMERAL",
        "return Zone(ZoneKind.MIXED, low.tenant) if low.kind is ZoneKind.PLAN else low",
        (f"{_ZONE}::test_joins_follow_the_table",),
    ),
    Mutant(
        "tenants_join_in_the_more_private", Hop.SCHEDULER, "engine/zone.py",
        "        if low.tenant != high.tenant:\n            return EPHEMERAL\n",
        "",
        (f"{_ZONE}::test_joins_follow_the_table",
         f"{_PROPERTIES}::test_what_is_cacheable_holds_text_of_one_tenant_and_one_case_at_most"),
    ),
    Mutant(
        "prefix_matched_past_what_may_be_cached", Hop.SCHEDULER, "engine/kv_cache_manager.py",
        "            if not zone.is_cacheable:\n                break\n",
        "",
        (f"{_CACHE}::test_an_uncacheable_zone_does_not_even_share_with_itself",
         f"{_CACHE}::test_nothing_after_an_uncacheable_block_is_shared"),
    ),
    Mutant(
        "foreign_block_in_a_table", Hop.SCHEDULER, "engine/kv_cache_manager.py",
        "        if self.pool.zone(block_id) != zone:\n",
        "        if False:\n",
        (f"{_CACHE}::test_a_foreign_block_in_a_table_is_refused",),
    ),
)  # fmt: skip

_BLOCK_POOL = (
    Mutant(
        "found_without_a_look_at_the_owner", Hop.POOL, "engine/block_pool.py",
        "        if block_id is not None and self._blocks[block_id].zone != zone:\n",
        "        if False:\n",
        (f"{_POOL}::test_a_block_of_another_zone_is_not_found_but_refused",
         f"{_CACHE}::test_a_digest_that_forgets_its_zone_is_caught_by_the_pool"),
    ),
    Mutant(
        "uncacheable_block_published", Hop.POOL, "engine/block_pool.py",
        "        if not self._zone_of(block_id).is_cacheable:\n            raise",
        "        if False:\n            raise",
        (f"{_POOL}::test_a_zone_that_is_not_cacheable_is_never_findable",),
    ),
    Mutant(
        "unfindable_block_shared", Hop.POOL, "engine/block_pool.py",
        "            if self._blocks[block_id].digest is None:\n                raise",
        "            if False:\n                raise",
        (f"{_POOL}::test_a_block_that_is_not_findable_cannot_be_shared",),
    ),
    Mutant(
        "block_handed_out_without_a_new_generation", Hop.POOL, "engine/block_pool.py",
        "            block.generation += 1\n",
        "",
        (f"{_POOL}::test_a_generation_rises_each_time_a_block_is_handed_out_anew",
         f"{_ENGINE}::test_a_reserved_block_has_a_new_generation_after_its_quarantine"),
    ),
    Mutant(
        "case_not_scrubbed", Hop.SCRUB, "engine/zone.py",
        "return self.kind >= ZoneKind.MIXED",
        "return self.kind >= ZoneKind.EPHEMERAL",
        (f"{_POOL}::test_private_blocks_are_scrubbed_before_they_are_free",
         f"{_ENGINE}::test_private_bytes_are_gone_from_the_cache_when_no_one_may_read_them"),
    ),
    Mutant(
        "quarantine_not_scrubbed", Hop.SCRUB, "engine/block_pool.py",
        "            self._blocks[block_id].quarantined_for = None\n"
        "            self._blocks[block_id].needs_scrub = True\n",
        "            self._blocks[block_id].quarantined_for = None\n",
        (f"{_POOL}::test_quarantined_blocks_are_nobodys_until_their_fence_has_passed",),
    ),
)  # fmt: skip

_TRANSFER = (
    Mutant(
        "ticket_of_any_zone", Hop.TICKET, "transfer/ticket.py",
        "            (ticket.zone == expected.zone, RefusalReason.WRONG_ZONE),\n",
        "",
        (f"{_TICKET}::test_ticket_for_something_else_is_refused_and_not_spent",
         f"{_HANDOFF}::test_refused_ticket_is_counted_and_writes_nothing"),
    ),
    Mutant(
        "ticket_of_any_sender", Hop.TICKET, "transfer/ticket.py",
        '            (ticket.sender in ("", self._agent_name), RefusalReason.WRONG_SENDER),\n',
        "",
        (f"{_TICKET}::test_ticket_for_something_else_is_refused_and_not_spent",),
    ),
    Mutant(
        "ticket_used_twice", Hop.TICKET, "transfer/ticket.py",
        "        self._guard.admit(ticket.nonce, ticket.expires_at_s)\n",
        "",
        (f"{_TICKET}::test_replayed_ticket_is_refused_even_after_many_others",
         f"{_HANDOFF}::test_replayed_ticket_opens_no_second_session"),
    ),
    Mutant(
        "ticket_without_an_end", Hop.TICKET, "transfer/ticket.py",
        "        if not ticket.expires_at_s > now:\n",
        "        if False:\n",
        (f"{_TICKET}::test_expired_ticket_is_refused",),
    ),
    Mutant(
        "ticket_pushed_to_another_than_its_issuer", Hop.TICKET, "transfer/handoff.py",
        "                raise TicketRefused(RefusalReason.WRONG_RECEIVER)\n",
        "                pass\n",
        (f"{_HANDOFF}::test_handshake_of_somebody_else_than_the_issuer_is_refused",),
    ),
    Mutant(
        "landing_digest_without_its_ticket", Hop.LANDING, "transfer/digest.py",
        'struct.pack("<IQ", len(binding), block_bytes) + binding)',
        'struct.pack("<IQ", 0, block_bytes))',
        ("tests/transfer/test_digest_and_notice.py::test_digest_depends_on_order_count_key_nonce_and_binding",),
    ),
    Mutant(
        "ticket_binding_without_its_content", Hop.LANDING, "transfer/ticket.py",
        'return hashlib.sha256(b"ticket|" + self.encode()).digest()',
        'return hashlib.sha256(b"ticket|").digest()',
        (f"{_TICKET}::test_binding_depends_on_every_field",),
    ),
    Mutant(
        "landing_not_compared_with_what_was_sent", Hop.LANDING, "transfer/handoff.py",
        "        if not hmac.compare_digest(digest.finish(), notice.digest):\n",
        "        if False:\n",
        (f"{_HANDOFF}::test_corrupted_byte_in_flight_is_refused_and_never_lands",
         f"{_HANDOFF}::test_blocks_in_another_order_are_refused",
         f"{_SIM}::test_a_corrupted_block_is_found_before_the_first_step"),
    ),
    Mutant(
        "landing_in_blocks_handed_out_anew", Hop.LANDING, "transfer/handoff.py",
        "        if tuple(self._receiver.generations_of(self.ticket.block_ids)) != self.ticket.generations:\n",
        "        if False:\n",
        (f"{_HANDOFF}::test_blocks_handed_out_anew_meanwhile_are_refused",),
    ),
    Mutant(
        "notice_of_anybody", Hop.LANDING, "transfer/notice.py",
        "if len(message) != NOTICE_BYTES or not hmac.compare_digest(code, _code(transfer_key, nonce, body)):",
        "if len(message) != NOTICE_BYTES:",
        ("tests/transfer/test_digest_and_notice.py::test_any_flipped_byte_of_a_notice_is_a_forgery",
         f"{_HANDOFF}::test_forged_notices_are_counted_and_the_true_one_still_counts"),
    ),
)  # fmt: skip

_EDGE = (
    Mutant(
        "claimed_zone_not_compared_with_the_credential", Hop.INGRESS, "deployments/trust/resolve.py",
        "    if not all(_may_name(principal, value) for value in claimed):\n",
        "    if False:\n",
        (f"{_TRUST}/test_resolve.py::test_zone_that_a_client_claims_beyond_its_credential_is_a_contradiction",
         f"{_TRUST}/test_guard.py::TestClientTexts::test_a_contradiction_is_forbidden_counted_and_audited"),
    ),
    Mutant(
        "any_case_of_the_tenant", Hop.INGRESS, "deployments/trust/resolve.py",
        "    if not principal.owns(zone):\n",
        "    if False:\n",
        (f"{_TRUST}/test_resolve.py::test_case_of_somebody_else_is_a_contradiction",),
    ),
    Mutant(
        "case_of_any_tenant", Hop.INGRESS, "deployments/trust/resolve.py",
        "is_own_case = private.kind is ZoneKind.CASE and private.tenant == principal.tenant",
        "is_own_case = private.kind is ZoneKind.CASE",
        (f"{_TRUST}/test_resolve.py::test_case_of_another_tenant_is_never_private_text_whatever_the_policy_allows",),
    ),
    Mutant(
        "zone_taken_from_the_body", Hop.INGRESS, "deployments/openai_api.py",
        "return {name: document.pop(name) for name in STRIPPED_PARAMETERS if name in document}",
        "return {name: document[name] for name in STRIPPED_PARAMETERS if name in document}",
        ("tests/deployments/test_openai_api.py::test_parameters_that_name_a_cache_are_removed_and_reported",),
    ),
    Mutant(
        "policy_that_allows_by_default", Hop.POLICY, "deployments/trust/policy.py",
        "        return Decision(False, verb, zone, None, DecisionReason.NO_RULE, self.digest)\n",
        "        return Decision(True, verb, zone, None, DecisionReason.NO_RULE, self.digest)\n",
        (f"{_TRUST}/test_policy.py::test_no_rules_allow_nothing",
         f"{_TRUST}/test_policy.py::test_shipped_policy_reaches_no_other_tenant"),
    ),
    Mutant(
        "rule_for_any_tenant", Hop.POLICY, "deployments/trust/policy.py",
        "tenant = own_tenant if self.tenant == OWN_TENANT else self.tenant",
        "tenant = zone.tenant if self.tenant == OWN_TENANT else self.tenant",
        (f"{_TRUST}/test_policy.py::test_policy_of_own_tenant_patterns_never_reaches_another_tenant",),
    ),
    Mutant(
        "strict_policy_that_shares", Hop.POLICY, "deployments/trust/policy.py",
        "        if self.strict and verb in SHARING and zone.tenant != principal.tenant:\n",
        "        if False:\n",
        (f"{_TRUST}/test_policy.py::test_strict_policy_shares_nothing_between_tenants_whatever_its_rules",),
    ),
    Mutant(
        "policy_not_asked", Hop.POLICY, "deployments/trust/resolve.py",
        "        return decisions[verb, zone].allowed\n",
        "        return True\n",
        (f"{_TRUST}/test_resolve.py::test_plan_that_the_policy_withholds_is_private",
         f"{_TRUST}/test_resolve.py::test_nothing_is_granted_that_the_policy_does_not_allow"),
    ),
    Mutant(
        "segment_shared_without_a_listing", Hop.MANIFEST, "deployments/trust/shareable.py",
        "    if is_shareable_kind(asked) and not is_shareable(asked, segment.content_digest):\n",
        "    if False:\n",
        (f"{_TRUST}/test_shareable.py::test_no_labelling_shares_what_is_not_listed",
         f"{_TRUST}/test_guard.py::TestOurOwnPrompts::test_without_manifests_nothing_is_shared"),
    ),
    Mutant(
        "plan_of_another_tenant_listed", Hop.MANIFEST, "deployments/trust/manifest_set.py",
        "(zone == PUBLIC or zone.tenant == tenant)",
        "True",
        (f"{_TRUST}/test_manifest.py::test_zone_of_a_text_depends_on_the_tenant",
         f"{_TRUST}/test_guard.py::TestClientTexts::test_text_of_another_tenants_plan_or_under_another_id_is_not_listed"),
    ),
    Mutant(
        "manifest_of_any_signer", Hop.MANIFEST, "deployments/trust/manifest.py",
        "        signer.key.verify(bytes.fromhex(envelope.signature), _SIGNED_AS + payload)\n",
        "        pass\n",
        (f"{_TRUST}/test_manifest.py::test_signature_that_does_not_hold_is_refused_before_anything_is_read",),
    ),
    Mutant(
        "answer_in_the_zone_of_shared_text", Hop.LABELS, "deployments/prompts.py",
        "return TokenisedPrompt(tuple(token_ids), with_private_end(unlabelled(len(token_ids), zone), private))",
        "return TokenisedPrompt(tuple(token_ids), unlabelled(len(token_ids), zone))",
        ("tests/deployments/test_prompts.py::test_one_text_is_closed_too",),
    ),
    Mutant(
        "prompt_without_a_private_end", Hop.LABELS, "deployments/trust/labelling.py",
        "    joined = last.zone.join(private)\n",
        "    joined = last.zone\n",
        ("tests/deployments/test_labelling.py::test_only_the_last_token_is_closed_and_all_that_follows_it",),
    ),
    Mutant(
        "token_over_a_boundary_in_the_wider_zone", Hop.LABELS, "deployments/trust/labelling.py",
        "spans[upcoming].start < max(end, start + 1)",
        "spans[upcoming].start <= start",
        ("tests/deployments/test_labelling.py::test_token_over_a_boundary_is_as_private_as_its_most_private_character",
         "tests/deployments/test_labelling.py::test_labels_equal_the_brute_force"),
    ),
    Mutant(
        "routing_without_zone", Hop.ROUTER, "deployments/generation.py",
        'struct.pack("<Q", span.epoch) + span.zone.path.encode()',
        'struct.pack("<Q", span.epoch)',
        ("tests/deployments/test_generation.py::TestAffinity::test_case_without_a_plan_returns_to_its_own_replica",),
    ),
    Mutant(
        "routing_without_epoch", Hop.ROUTER, "deployments/generation.py",
        'struct.pack("<Q", span.epoch) + span.zone.path.encode()',
        "span.zone.path.encode()",
        ("tests/deployments/test_generation.py::TestAffinity::test_a_purge_of_its_zone_changes_it_and_of_another_does_not",),
    ),
    Mutant(
        "routing_without_key", Hop.ROUTER, "deployments/generation.py",
        "hmac.digest(self._affinity_key, ",
        'hmac.digest(b"", ',
        ("tests/deployments/test_generation.py::TestAffinity::test_digest_says_nothing_without_the_key",),
    ),
)  # fmt: skip

_ADMISSION = (
    Mutant(
        "decode_without_a_look_at_the_grant", Hop.DECODE, "deployments/decode.py",
        "            self.grants.verify(call)\n",
        "",
        (f"{_BOUNDARIES}::test_decode_computes_nothing_for_a_call_that_is_not_as_the_ingress_sealed_it",
         f"{_BOUNDARIES}::test_an_expired_grant_computes_nothing"),
    ),
    Mutant(
        "label_of_another_tenant_admitted", Hop.DECODE, "engine/scheduler.py",
        'if request.tenant and any(span.zone.tenant not in ("", request.tenant) for span in request.zone_spans):',
        "if False:",
        (f"{_ZONE_CACHE}::test_a_request_labelled_with_another_tenants_zone_is_refused",),
    ),
    Mutant(
        "prefill_without_a_look_at_the_grant", Hop.PREFILL, "deployments/prefill.py",
        "            self.grants.verify(granted)\n",
        "            pass\n",
        (f"{_BOUNDARIES}::test_prefill_trusts_the_ingress_and_not_decode",),
    ),
    Mutant(
        "ticket_not_held_against_the_grants_zone", Hop.PREFILL, "deployments/prefill.py",
        "            zone=request.zone.path,\n",
        '            zone=self._sealer.open(call.sealed_ticket).ticket.zone,\n',
        (f"{_BOUNDARIES}::test_a_ticket_of_one_request_is_not_good_for_the_grant_of_another[other0-wrong_zone]",),
    ),
    Mutant(
        "ticket_below_prefills_own_epoch", Hop.PREFILL, "deployments/prefill.py",
        "            epoch_floor=self._epoch_floor(request.zone),\n",
        "",
        (f"{_BOUNDARIES}::test_prefill_refuses_a_ticket_of_an_epoch_that_it_has_purged",),
    ),
    Mutant(
        "grant_without_zones", Hop.GRANT, "deployments/trust/zone_grant.py",
        "            [[span.end, *_plain(span.zone), span.epoch] for span in call.zone_spans],\n",
        "",
        (f"{_TRUST}/test_zone_grant.py::test_a_call_that_was_changed_after_its_seal_is_forged",
         f"{_BOUNDARIES}::test_decode_computes_nothing_for_a_call_that_is_not_as_the_ingress_sealed_it[public]"),
    ),
    Mutant(
        "grant_without_epoch", Hop.GRANT, "deployments/trust/zone_grant.py",
        "            call.epoch,\n",
        "",
        (f"{_TRUST}/test_zone_grant.py::test_a_call_that_was_changed_after_its_seal_is_forged",
         f"{_BOUNDARIES}::test_decode_computes_nothing_for_a_call_that_is_not_as_the_ingress_sealed_it[another epoch]"),
    ),
    Mutant(
        "grant_for_any_prompt", Hop.GRANT, "deployments/trust/zone_grant.py",
        'hashlib.sha256(array("I", call.prompt_token_ids)).digest()',
        "b\"\"",
        (f"{_TRUST}/test_zone_grant.py::test_a_call_that_was_changed_after_its_seal_is_forged",
         f"{_BOUNDARIES}::test_prefill_trusts_the_ingress_and_not_decode[another prompt]"),
    ),
    Mutant(
        "grant_for_zones_of_any_tenant", Hop.GRANT, "deployments/trust/zone_grant.py",
        'if any(span.zone.tenant not in ("", call.tenant) for span in call.zone_spans):',
        "if False:",
        (f"{_TRUST}/test_zone_grant.py::test_a_zone_of_another_tenant_is_never_sealed",),
    ),
    Mutant(
        "ticket_of_any_epoch", Hop.TICKET, "transfer/ticket.py",
        "            (ticket.epoch == expected.epoch >= expected.epoch_floor, RefusalReason.WRONG_EPOCH),\n",
        "",
        (f"{_TICKET}::test_ticket_for_something_else_is_refused_and_not_spent",
         f"{_BOUNDARIES}::test_prefill_refuses_a_ticket_of_an_epoch_that_it_has_purged"),
    ),
    Mutant(
        "ticket_of_any_request", Hop.TICKET, "transfer/ticket.py",
        "            (_is_attempt_of(expected.request_id, ticket.request_id), RefusalReason.WRONG_REQUEST),\n",
        "",
        (f"{_BOUNDARIES}::test_a_ticket_of_one_request_is_not_good_for_the_grant_of_another[other1-wrong_request]",),
    ),
)  # fmt: skip

_PURGE = (
    Mutant(
        "purge_that_keeps_the_index", Hop.PURGE, "engine/block_pool.py",
        '        return self._withdraw(block_ids, "purge")\n',
        "        return 0\n",
        (f"{_POOL}::test_purge_scrubs_idle_blocks_at_once_and_used_ones_when_they_are_freed",
         f"{_ENGINE}::test_a_purge_reaches_idle_blocks_at_once_and_those_in_use_when_they_are_freed"),
    ),
    Mutant(
        "purge_that_does_not_scrub_a_plan", Hop.PURGE, "engine/block_pool.py",
        "        for block_id in block_ids:\n            self._blocks[block_id].needs_scrub = True\n        return",
        "        return",
        (f"{_POOL}::test_purge_scrubs_idle_blocks_at_once_and_used_ones_when_they_are_freed",),
    ),
    Mutant(
        "purge_that_live_requests_outlive", Hop.PURGE, "engine/kv_cache_manager.py",
        "                request.num_shareable_blocks = min(request.num_shareable_blocks, first)\n",
        "                pass\n",
        (f"{_CACHE}::test_a_purge_makes_cached_blocks_unfindable_and_keeps_live_requests_from_publishing",),
    ),
    Mutant(
        "request_of_an_epoch_that_was_purged", Hop.PURGE, "engine/kv_cache_manager.py",
        "        stale = self._first_stale_block(request)\n",
        "        stale = None\n",
        (f"{_ZONE_CACHE}::test_from_the_first_block_of_a_zone_whose_epoch_is_stale_nothing_is_found_or_published",),
    ),
    Mutant(
        "purge_that_misses_a_zone_too_short_for_a_block", Hop.PURGE, "engine/kv_cache_manager.py",
        " + self._inner_epochs(request, index, zone)\n",
        "\n",
        (f"{_ZONE_CACHE}::test_a_purge_reaches_a_zone_too_short_to_own_a_block", _FINDS),
    ),
    Mutant(
        "purge_that_pins_outlive", Hop.PURGE, "engine/kv_cache_manager.py",
        "        for name in [name for name, block_ids in self._pins.items() if not pinned.isdisjoint(block_ids)]:\n"
        "            self.unpin(name)\n",
        "",
        (f"{_ZONE_CACHE}::test_purging_a_zone_unpins_every_prefix_that_holds_a_block_of_it",),
    ),
    Mutant(
        "rotation_that_keeps_the_index", Hop.PURGE, "engine/kv_cache_manager.py",
        '        return self.drop_all("rekey", live_requests)\n',
        "        return 0\n",
        (f"{_ZONE_CACHE}::test_a_new_key_drops_everything_and_live_requests_publish_nothing_under_it",),
    ),
    Mutant(
        "call_without_the_epochs_of_now", Hop.PURGE, "deployments/generation.py",
        "        spans = stamped(prompt.zone_spans, self._epochs)\n",
        "        spans = prompt.zone_spans\n",
        ("tests/deployments/test_generation.py::TestOneChoice::test_call_is_sealed_with_the_epochs_of_now_and_the_tenant",),
    ),
    Mutant(
        "epoch_that_a_restart_forgets", Hop.PURGE, "deployments/trust/epochs.py",
        "                    replace_file(self._path, _write(raised), mode=0o600)\n",
        "                    pass\n",
        (f"{_TRUST}/test_epochs.py::test_a_purge_raises_one_zone_and_is_remembered",
         f"{_TRUST}/test_purge.py::test_epoch_is_on_the_medium_before_any_replica_is_told"),
    ),
    Mutant(
        "purge_of_one_pool", Hop.PURGE, "deployments/trust/purge.py",
        "for name in self._pools)",
        "for name in list(self._pools)[:1])",
        (f"{_TRUST}/test_purge.py::test_every_replica_of_every_pool_is_told_and_the_receipt_says_so",),
    ),
)  # fmt: skip

_CACHE_SHARES = (
    Mutant(
        "tenant_under_anothers_floor", Hop.EVICTION, "engine/idle_blocks.py",
        "        return max(0, self.num_idle - max(self.num_guarded, self.quota.floor))\n",
        "        return max(0, self.num_idle - self.num_guarded)\n",
        (f"{_ZONE_CACHE}::test_no_flood_costs_another_tenant_one_block_within_its_floor",),
    ),
    Mutant(
        "cases_under_their_plans_floor", Hop.EVICTION, "engine/idle_blocks.py",
        "        return max(0, self.num_idle - max(self.num_guarded, self.quota.floor))\n",
        "        return max(0, self.num_idle - self.quota.floor)\n",
        (f"{_ZONE_CACHE}::test_a_zone_floor_protects_a_plan_from_its_own_tenants_cases",),
    ),
    Mutant(
        "tenant_above_its_cap", Hop.EVICTION, "engine/block_pool.py",
        "        self._apply_caps([zone for zone, _ in runs])\n",
        "",
        (f"{_ZONE_CACHE}::test_above_its_cap_a_tenant_loses_its_own_least_recently_used_blocks_and_nobody_elses",),
    ),
    Mutant(
        "case_pinned", Hop.EVICTION, "engine/kv_cache_manager.py",
        "block_id = None if zone.kind is ZoneKind.CASE else self.pool.find(digest, zone)",
        "block_id = self.pool.find(digest, zone)",
        (f"{_ZONE_CACHE}::test_what_a_pin_does_not_keep_is_freed_and_a_case_is_never_kept",),
    ),
    Mutant(
        "case_that_never_expires", Hop.EVICTION, "engine/kv_cache_manager.py",
        '            num_dropped += self.pool.drop_idle(zone, "ttl")\n',
        "",
        (f"{_CACHE}::test_a_case_unused_for_its_time_to_live_is_scrubbed_and_forgotten",),
    ),
    Mutant(
        "hits_of_public_text_told", Hop.REPORT, "deployments/reuse.py",
        "return max(0, min(counts, default=0) - self.num_shared)",
        "return min(counts, default=0)",
        ("tests/deployments/test_reuse.py::test_public_tokens_are_not_told_of",),
    ),
)  # fmt: skip

MUTANTS = (*_DIGEST, *_SCHEDULER, *_BLOCK_POOL, *_TRANSFER, *_EDGE, *_ADMISSION, *_PURGE, *_CACHE_SHARES)
