"""What a configuration would deploy, as a table: replicas, memory, limits. Starts nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from deployments.affinity import can_pin
from deployments.config import ConfigError, PoolSection, TrustSection, ZoneserveConfig, require_context
from deployments.settings import read_settings
from deployments.trust.policy import DEFAULT_POLICY, PolicyError, load_policy
from engine import model_store
from engine.checkpoint import load_checkpoint
from engine.kv_cache import KVCacheLayout, native_slab_order
from engine.model_config import ModelConfig
from engine.native.build import COMPILER
from engine.native.packing import unsupported_reason

MIB = 1 << 20


def describe(config: ZoneserveConfig, source: Path) -> RenderableType:
    """
    Raises:
        CheckpointError: The model is not in the cache or cannot be served.
        ConfigError: The model's context is shorter than the configuration's, or the policy file cannot be used.
    """
    path = model_store.resolve(config.model.name, read_settings().model_cache)
    model = load_checkpoint(path).config
    require_context(config, model.max_position)
    fallback = _fallback_reason(config, model)
    is_native = config.engine.backend == "native" and fallback is None
    layout = KVCacheLayout(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        config.engine.block_size,
        config.model.dtype,
        slab_order=native_slab_order(config.engine.block_size) if is_native else "rows",
    )
    facts = Table(show_header=False, title=f"{source}: valid")
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("mode", config.mode)
    facts.add_row("model", f"{config.model.served_name} ({model.architecture}, {config.model.dtype}) from {path}")
    facts.add_row("backend", config.engine.backend if fallback is None else f"torch, not native: {fallback}")
    facts.add_row("context", f"{config.model.max_model_len} tokens")
    facts.add_row("KV block", f"{config.engine.block_size} tokens, {layout.block_bytes // 1024} KiB")
    facts.add_row("KV layout", layout.fingerprint()[:16])
    facts.add_row("endpoint", f"http://{config.ingress.host}:{config.ingress.port}")
    facts.add_row("in flight at most", f"{config.routing.max_inflight_requests} generations an ingress")
    for name, text in _trust_rows(config.trust):
        facts.add_row(name, text)
    columns = ("role", "replicas", "threads", "cores", "KV blocks", "KV memory each", "tokens each")
    pools = Table(*columns, title="would deploy")
    pools.add_row("ingress", str(config.ingress.replicas), "1", *["-"] * 4)
    if config.mode == "disaggregated":
        pools.add_row("prefill", *_pool_cells(config.prefill, layout))
    pools.add_row("decode", *_pool_cells(config.decode, layout))
    return Group(facts, pools)


def _trust_rows(trust: TrustSection) -> list[tuple[str, str]]:
    policy_file = trust.policy_file or DEFAULT_POLICY
    policy = f"{policy_file}, not on this machine"
    if policy_file.exists():
        try:
            digest = load_policy(policy_file).digest[:16]
        except PolicyError as error:
            raise ConfigError(str(error)) from error
        policy = f"{trust.policy_file or 'as shipped'}, {digest}, read again every {trust.policy_reload_s:g} s"
    tokens = "none: static keys only"
    if trust.jwt is not None:
        source = trust.jwt.jwks_file or trust.jwt.jwks_url
        tokens = f"of {trust.jwt.issuer} for {trust.jwt.audience}, keys from {source}"
    shared = "nothing: there are no manifests"
    if trust.manifests_dir is not None:
        shared = f"what the manifests in {trust.manifests_dir} list, signed by keys of {trust.manifest_keys_file}"
    audit = "none: nothing is recorded"
    if trust.audit is not None:
        audit = f"{trust.audit.dir}; where it cannot be written: {trust.audit.on_failure}"
    return [("policy", policy), ("tokens", tokens), ("shared texts", shared), ("audit log", audit)]


def _pool_cells(pool: PoolSection, layout: KVCacheLayout) -> list[str]:
    return [
        str(pool.replicas),
        str(pool.num_threads),
        _cores(pool),
        str(pool.num_blocks),
        f"{pool.num_blocks * layout.block_bytes / MIB:.0f} MiB",
        str(pool.num_blocks * layout.block_size),
    ]


def _cores(pool: PoolSection) -> str:
    places = ", ".join(map(str, pool.cpus)) or "any"
    return places if can_pin(pool.cpus) else f"any: this machine has no {places}"


def _fallback_reason(config: ZoneserveConfig, model: ModelConfig) -> str | None:
    """Why this machine would run torch where native is asked for, as far as can be told without compiling."""
    if config.engine.backend != "native":
        return None
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER} on the PATH to compile its kernels"
    return unsupported_reason(model, dtype=config.model.dtype, device=config.decode.device)
