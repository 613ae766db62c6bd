"""Purge and key rotation on a real deployment, and the shared texts that it keeps resident."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from deployments.trust.keyring import read_keyring, rotate_key
from deployments.trust.receipts import receipt_keys, verify_receipt
from engine.zone import Zone
from tests.deployments.test_trust_over_http import MODEL, chat, counted, hits, metrics, post, total, wait_for_record
from tests.local_deployment import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.model]

ROTATION_TIMEOUT_S = 30.0


def case() -> str:
    return f"c-{secrets.token_hex(8)}"


def headers_for(deployment: Deployment, name: str, **claims: object) -> dict[str, str]:
    return deployment.token_headers(cases=[name], **claims)


def zone_of(name: str) -> str:
    return f"tenant/alpha/case/{name}"


def purge(deployment: Deployment, zone: object, headers: Mapping[str, str] | None = None) -> httpx.Response:
    admin = deployment.token_headers(roles=["zone-admin"])
    return post(deployment, "/v1/zones/purge", {"zone": zone}, headers or admin)


def text() -> str:
    return f"Note {secrets.token_hex(8)}. " + "The member was seen once and asked for a second visit. " * 20


class TestPurge:
    def test_the_receipt_is_signed_names_every_replica_and_is_on_record(self, clean_deployment: Deployment) -> None:
        name, said = case(), text()
        headers, metadata = headers_for(clean_deployment, name), {"zoneserve.case": name}
        hits(clean_deployment, lambda: chat(clean_deployment, headers, said, metadata=metadata))
        with counted(clean_deployment, "purges_total", 1, outcome="complete"):
            response = purge(clean_deployment, zone_of(name))
        assert response.status_code == 200
        ring = read_keyring(clean_deployment.config.trust.master_key_file)
        signed = verify_receipt(response.content, receipt_keys(ring))
        receipt = signed.receipt
        assert (receipt.zone, receipt.epoch, receipt.principal, receipt.complete) == (zone_of(name), 1, "ann", True)
        assert {pool.pool for pool in receipt.pools} == {"decode", "prefill"}
        assert all(replica.num_findable > 0 == replica.num_in_use for replica in receipt.replicas)
        assert all(replica.num_scrubbed >= replica.num_findable for replica in receipt.replicas)
        found = wait_for_record(clean_deployment, "zone.purge", zone=zone_of(name))
        assert found.fields["receipt_digest"] == signed.digest
        again = verify_receipt(purge(clean_deployment, zone_of(name)).content, receipt_keys(ring)).receipt
        assert again.epoch == 2
        assert sum(replica.num_findable for replica in again.replicas) == 0  # there was nothing left

    def test_an_answer_under_way_goes_on_and_its_blocks_are_not_found_again(self, clean_deployment: Deployment) -> None:
        name, said = case(), text()
        headers, metadata = headers_for(clean_deployment, name), {"zoneserve.case": name}
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": said}], "temperature": 0, "metadata": metadata,
            "stream": True, "max_tokens": 150,
        }  # fmt: skip
        url = f"{clean_deployment.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120.0) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: {"))
            for _ in range(5):
                next(lines)
            receipt = json.loads(purge(clean_deployment, zone_of(name)).content)["receipt"]
            in_use = [replica["num_in_use"] for pool in receipt["pools"] for replica in pool["replicas"]]
            assert sum(in_use) > 0  # the purge came while it was being answered
            last = json.loads([*lines][-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        clean_deployment.assert_clean()
        assert hits(clean_deployment, lambda: chat(clean_deployment, headers, said, metadata=metadata)) == 0
        assert hits(clean_deployment, lambda: chat(clean_deployment, headers, said, metadata=metadata)) > 0

    @pytest.mark.parametrize(
        ("zone", "claims"),
        [
            ("tenant/alpha/case/one", {}),  # no role
            ("tenant/beta/case/one", {"roles": ["zone-admin"]}),  # another tenant's
            ("public", {"roles": ["zone-admin"]}),  # an operator's
            ("tenant/alpha/case/one", {"roles": ["operator"]}),
        ],
    )
    def test_who_may_not_purge_is_403_and_counted_and_audited(
        self, zone: str, claims: dict[str, Any], clean_deployment: Deployment
    ) -> None:
        with counted(clean_deployment, "zone_denials_total", 1, reason="no_rule"):
            response = purge(clean_deployment, zone, clean_deployment.token_headers(**claims))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
        wait_for_record(clean_deployment, "zone.deny", zone=zone, verb="purge", principal="ann")

    @pytest.mark.parametrize(
        "zone",
        [
            "tenant/alpha/case/..",
            "tenant/alpha/case/a..b",
            "tenant//case/one",
            "tenant/alpha/case/",
            "/public",
            "tenant/alpha/case/" + "x" * 10_000,
            "tenant/аlpha/case/one",  # a Cyrillic letter
            "tenant/alpha/case/one\u200b",
            "tenant/alpha/mixed",
            "ephemeral",
            "",
            7,
            None,
        ],
    )
    def test_what_is_no_zone_that_can_be_cached_is_400_and_counted_and_audited(
        self, zone: object, clean_deployment: Deployment
    ) -> None:
        with counted(clean_deployment, "zone_denials_total", 1, reason="malformed_zone"):
            response = purge(clean_deployment, zone)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "zone")
        assert not isinstance(zone, str) or len(zone) < 8 or zone not in response.text
        wait_for_record(clean_deployment, "zone.deny", reason="malformed_zone")

    def test_without_a_credential_it_is_401(self, clean_deployment: Deployment) -> None:
        assert purge(clean_deployment, "public", {"X-Zone": "public"}).status_code == 401


class TestResidentTexts:
    def test_shared_texts_are_pinned_on_both_pools_before_anyone_asks(self, clean_deployment: Deployment) -> None:
        for role in ("decode", "prefill"):
            pinned = total(clean_deployment, "kv_blocks_pinned", role=role)
            assert pinned >= 100, role
            assert clean_deployment.stats(role)["blocks_pinned"] == pinned
        failures = metrics(clean_deployment).by_label("zoneserve_prewarm_failures_total", "reason")
        # Four tenants' plans are more than this small pool may pin; other tests sign manifests without keeping a text.
        assert set(failures) <= {"no_room", "no_text"}


class TestRotation:
    def test_a_new_master_key_empties_the_cache_and_loses_no_request(self, clean_deployment: Deployment) -> None:
        deployment = clean_deployment
        name, said = case(), text()
        headers, metadata = headers_for(deployment, name), {"zoneserve.case": name}

        def ask() -> httpx.Response:
            return chat(deployment, headers, said, metadata=metadata)

        assert hits(deployment, ask) == 0
        warm = hits(deployment, ask)
        assert warm > 0
        statuses: list[int] = []
        is_over = threading.Event()

        def keep_asking() -> None:
            while not is_over.is_set():
                statuses.append(chat(deployment, deployment.headers("gamma"), said).status_code)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            before = total(deployment, "key_rotations_total")
            assert deployment.config.trust.master_key_file is not None
            rotate_key(deployment.config.trust.master_key_file, now=time.time())
            deployment.wait_until(lambda: total(deployment, "key_rotations_total") == before + 3, ROTATION_TIMEOUT_S)
            time.sleep(2.0)  # the time in which the old key still seals, and the turn to the new one
        finally:
            is_over.set()
            asking.join()
        assert len(statuses) > 1
        assert set(statuses) == {200}
        assert total(deployment, "grant_refusals_total") == 0
        assert hits(deployment, ask) == 0
        assert hits(deployment, ask) == warm
        for role in ("decode", "prefill"):  # what is shared is resident again, under the new key
            deployment.wait_until(lambda role=role: total(deployment, "kv_blocks_pinned", role=role) >= 30, 30.0)
        events = deployment.generate([*range(5, 305)], zone=Zone.parse(zone_of(name)).path, max_tokens=2)
        assert events[-1].finish_reason is not None  # a grant under the new key is taken
