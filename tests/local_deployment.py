"""A local deployment for tests: float32, so that its tokens can be held against the oracle. The native backend, which
the shipped configuration asks for, gives way to torch then."""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.config import BUNDLED, ZoneserveConfig, parse_config
from deployments.messages import GenerateCall, TokenEvent
from engine.request import SamplingParams
from engine.zone import Zone, ZoneSpan

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

    def headers(self, tenant: str = "gamma") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

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
        """All events of one sequence, straight from a decode replica."""
        call = GenerateCall(
            request_id=f"test-{secrets.token_hex(8)}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),
            zone_spans=(ZoneSpan(len(prompt), Zone.parse(zone)),),
            timeout_s=120.0,
        )
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
    document["prefill"] |= {"num_blocks": 320}
    document["decode"] |= {"num_blocks": 320}
    document["claims"] |= {"max_claims_per_call": 100}
    document["ingress"] |= {"port": _free_port()}
    document["routing"] |= {"reserve_timeout_s": 20, "request_timeout_s": 120}
    document["trust"] = {"keys_file": str(folder / "keys.yaml"), "master_key_file": str(folder / "master.key")}
    keys = _write_keys(folder)
    config = parse_config(document)
    with local_deployment(config, client_key_file=folder / "client-key") as endpoint:
        yield Deployment(endpoint.url, config, keys)
