"""A local deployment for tests: float32, so that its tokens can be held against the oracle. The native backend, which
the shipped configuration asks for, gives way to torch then."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from deployments.config import BUNDLED, ZoneserveConfig, parse_config
from deployments.messages import GenerateCall, TokenEvent
from deployments.trust.keyring import read_keyring
from deployments.trust.policy import DEFAULT_POLICY
from deployments.trust.upkeep import GRANT_KEY_INFO
from deployments.trust.zone_grant import GrantSealer
from engine.request import SamplingParams
from engine.zone import Zone, ZoneSpan

ISSUER, AUDIENCE = "https://id.example", "zoneserve-tests"
TENANTS = {"alpha": "tenant/alpha/case/one", "beta": "tenant/beta/case/one", "gamma": "ephemeral"}
CLEAN_WITHIN_S = 1.0
RECOVERY_TIMEOUT_S = 60.0
_IDLE_COUNTS = ("running", "waiting", "reserved", "held", "blocks_used", "blocks_quarantined", "background")


@dataclass(frozen=True)
class Deployment:
    """A running deployment and the keys of its callers, by tenant."""

    url: str
    config: ZoneserveConfig
    keys: dict[str, str]
    signer: ec.EllipticCurvePrivateKey

    def headers(self, tenant: str = "gamma") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def token_headers(self, *, key: ec.EllipticCurvePrivateKey | None = None, **claims: object) -> dict[str, str]:
        """Headers of a caller with a token that names `tenant` alpha and no case, unless `claims` say otherwise."""
        good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "tenant": "alpha", "exp": int(time.time()) + 600}
        token = jwt.encode(good | claims, key or self.signer, algorithm="ES256", headers={"kid": "key-1"})
        return {"Authorization": f"Bearer {token}"}

    def handle(self, role: str) -> Any:
        from ray import serve

        handle = serve.get_deployment_handle(role, "zoneserve")
        if not handle.is_initialized:
            handle._init(_run_router_in_separate_loop=True)  # a test has no event loop of its own
        return handle

    def stats(self, role: str) -> dict[str, Any]:
        (stats,) = self.handle(role).broadcast("engine_stats").results(timeout_s=10.0)
        return dict(stats)

    def generate(self, prompt: Sequence[int], *, zone: str = "ephemeral", **sampling: Any) -> list[TokenEvent]:
        """All events of one sequence, straight from a decode replica, with a grant as the ingress seals it."""
        call = GenerateCall(
            request_id=f"test-{secrets.token_hex(8)}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),
            zone_spans=(ZoneSpan(len(prompt), Zone.parse(zone)),),
            timeout_s=120.0,
            tenant=Zone.parse(zone).tenant,
        )
        grants = GrantSealer(read_keyring(self.config.trust.master_key_file).derive(GRANT_KEY_INFO))
        call = replace(call, grant=grants.seal(call))
        return list(self.handle("decode").options(stream=True).generate.remote(call))

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until `condition` holds; fails where it does not within `timeout_s`."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {self.leftovers()}"
            time.sleep(0.02)
        return time.monotonic() - started

    def leftovers(self) -> dict[str, int]:
        """Requests and blocks that anything still holds, on either side."""
        left = {}
        for role in ("decode", "prefill"):
            stats = self.stats(role)
            left.update({f"{role}.{name}": stats[name] for name in _IDLE_COUNTS if stats[name]})
        return left

    def assert_clean(self, within_s: float = CLEAN_WITHIN_S) -> None:
        self.wait_until(lambda: not self.leftovers(), within_s)
        for role in ("decode", "prefill"):
            self.handle(role).broadcast("check_integrity").results(timeout_s=10.0)

    def wait_for_recovery(self) -> None:
        """Until both pools answer again."""
        import httpx

        self.wait_until(lambda: httpx.get(f"{self.url}/health", timeout=20.0).status_code == 200, RECOVERY_TIMEOUT_S)


def _write_keys(folder: Path) -> dict[str, str]:
    keys = {tenant: f"zs-{secrets.token_urlsafe(24)}" for tenant in TENANTS}
    entries = [
        {
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "principal": f"{tenant}-reviewer",
            "tenant": tenant,
            "zone": TENANTS[tenant],
        }
        for tenant, key in keys.items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    (folder / "master.key").write_text(secrets.token_hex(32))
    return keys


def _write_jwks(path: Path) -> ec.EllipticCurvePrivateKey:
    signer = ec.generate_private_key(ec.SECP256R1())
    public = jwt.algorithms.ECAlgorithm.to_jwk(signer.public_key(), as_dict=True)
    path.write_text(json.dumps({"keys": [public | {"kid": "key-1"}]}))
    return signer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def start_deployment(model_path: Path, folder: Path) -> Iterator[Deployment]:
    """1 ingress, 1 prefill, 1 decode over NIXL, as `make serve` starts them."""
    from deployments.local import local_deployment

    document = yaml.safe_load((BUNDLED / "local.yaml").read_text())
    document["model"] |= {"name": str(model_path), "dtype": "float32", "max_model_len": 4096}
    document["engine"] |= {"max_num_batched_tokens": 128, "max_prefill_chunk": 128}
    document["prefill"] |= {"num_blocks": 440}
    document["decode"] |= {"num_blocks": 440}
    document["claims"] |= {"max_claims_per_call": 100}
    document["ingress"] |= {"port": _free_port()}
    document["routing"] |= {"reserve_timeout_s": 20, "request_timeout_s": 120}
    document["trust"] = {
        "keys_file": str(folder / "keys.yaml"),
        "master_key_file": str(folder / "master.key"),
        "create_missing": True,
        "state_dir": str(folder / "state"),
        "quotas": {"public_cap": 0.1},
        "prewarm_share": 0.3,
        "report_cached_tokens": True,
        "jwt": {"jwks_file": str(folder / "jwks.json"), "issuer": ISSUER, "audience": AUDIENCE},
        "policy_file": str(folder / "policy.yaml"),
        "policy_reload_s": 0.2,
        "manifests_dir": str(folder / "manifests"),
        "manifest_keys_file": str(folder / "manifest-keys.yaml"),
        "audit": {"dir": str(folder / "audit"), "probe_s": 0.2},
    }
    (folder / "policy.yaml").write_bytes(DEFAULT_POLICY.read_bytes())
    keys, signer = _write_keys(folder), _write_jwks(folder / "jwks.json")
    config = parse_config(document)
    with local_deployment(config, client_key_file=folder / "client-key") as endpoint:
        yield Deployment(endpoint.url, config, keys, signer)
