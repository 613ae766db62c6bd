"""The deployment's configuration: one YAML file, checked once, frozen. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.trust.audit.log import AuditOptions
from engine.zone import Zone, ZoneKind, is_zone_name

MAX_CONFIG_BYTES = 1 << 20
BUNDLED = Path(__file__).parent / "configs"
_AUDIT = AuditOptions()


class ConfigError(Exception):
    """A configuration that cannot be used. The message names file, key and fault."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class ModelSection(_Section):
    """Which checkpoint is served, and in which arithmetic."""

    name: str = Field(min_length=1, description="catalogue name, .gguf file or checkpoint directory")
    served_name: str = Field(min_length=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len: int = Field(default=8192, ge=16)


class EngineSection(_Section):
    """Step budget and block geometry, the same on both pools."""

    backend: Literal["torch", "native"] = "torch"
    block_size: int = Field(default=16, ge=1, le=256)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    max_num_seqs: int = Field(default=32, ge=1)
    max_prefill_chunk: int = Field(default=256, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    case_idle_ttl_s: float = Field(default=900.0, gt=0)


class PoolSection(_Section):
    """One pool of replicas."""

    replicas: int = Field(default=1, ge=1, le=1000)
    num_blocks: int = Field(ge=8)
    num_threads: int = Field(default=1, ge=1)
    cpus: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = Field(
        default=(),
        strict=False,  # YAML has no tuples, only lists
        description="cores the replica is pinned to, counted among those that the process may use; empty: not pinned",
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels a replica needs")

    @model_validator(mode="after")
    def _cores_are_one_replicas_own(self) -> Self:
        if not self.cpus:
            return self
        if len(set(self.cpus)) != len(self.cpus):
            raise ValueError("cpus names a core twice")
        if self.replicas > 1:
            raise ValueError(f"cpus would put all {self.replicas} replicas on the same cores")
        if self.num_threads > len(self.cpus):
            raise ValueError(f"num_threads: {self.num_threads} threads would share the {len(self.cpus)} cores of cpus")
        return self


class TransferSection(_Section):
    """How KV blocks move from prefill to decode."""

    mode: Literal["push"] = "push"
    ticket_ttl_s: float = Field(default=60.0, gt=0)
    write_timeout_s: float = Field(default=10.0, gt=0)
    handoff_timeout_s: float = Field(default=60.0, gt=0)
    fence_timeout_s: float = Field(default=30.0, gt=0)


class RoutingSection(_Section):
    """Admission and choice of replica."""

    local_prefill_max_tokens: int = Field(default=64, ge=0, description="an uncached tail this short stays on decode")
    max_inflight_requests: int = Field(default=64, ge=1)
    choose_timeout_s: float = Field(default=10.0, gt=0)
    reserve_timeout_s: float = Field(default=30.0, gt=0)
    request_timeout_s: float = Field(default=300.0, gt=0)
    affinity_max_imbalance: int = Field(default=4, ge=0)


class IngressSection(_Section):
    """The HTTP edge."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_ongoing_requests: int = Field(default=256, ge=1)
    labels: dict[str, str] = Field(default_factory=dict)


class JwtSection(_Section):
    """Tokens of an identity provider: its keys from a JWKS file or URL, and what a token must say."""

    jwks_file: Path | None = Field(default=None, strict=False)
    jwks_url: str | None = Field(default=None, pattern=r"^https://[^\s/]+", max_length=2048)
    issuer: str = Field(min_length=1, max_length=2048)
    audience: str = Field(min_length=1, max_length=256)
    subject_claim: str = Field(default="sub", min_length=1, max_length=256)
    tenant_claim: str = Field(default="tenant", min_length=1, max_length=256)
    roles_claim: str = Field(default="roles", min_length=1, max_length=256)
    cases_claim: str = Field(default="cases", min_length=1, max_length=256)
    leeway_s: float = Field(default=30.0, ge=0, le=300)

    @model_validator(mode="after")
    def _has_one_key_source(self) -> Self:
        if (self.jwks_file is None) == (self.jwks_url is None):
            raise ValueError("give exactly one of jwks_file and jwks_url")
        return self


class AuditSection(_Section):
    """The audit log: where, its limits (see `AuditOptions`), and whether private work goes on where it cannot be
    written."""

    dir: Path = Field(strict=False)
    on_failure: Literal["refuse", "continue"] = _AUDIT.on_failure
    max_queue: int = Field(default=_AUDIT.max_queue, ge=1, le=1_000_000)
    fsync_records: int = Field(default=_AUDIT.fsync_records, ge=1, le=100_000)
    fsync_ms: int = Field(default=_AUDIT.fsync_ms, ge=0, le=10_000)
    anchor_records: int = Field(default=_AUDIT.anchor_records, ge=1)
    anchor_s: int = Field(default=_AUDIT.anchor_s, ge=1)
    rotate_bytes: int = Field(default=_AUDIT.rotate_bytes, ge=1 << 16)
    rotate_s: int = Field(default=_AUDIT.rotate_s, ge=60)
    probe_s: float = Field(default=_AUDIT.probe_s, gt=0)
    durable_timeout_s: float = Field(default=_AUDIT.durable_timeout_s, gt=0)

    def options(self) -> AuditOptions:
        return AuditOptions(**self.model_dump(exclude={"dir"}))


Share = Annotated[float, Field(ge=0.0, le=1.0)]


class QuotaEntry(_Section):
    """Shares of each pool's blocks: what others may not evict, and what may stay cached while nobody uses it."""

    floor: Share = 0.0
    cap: Share = 1.0

    @model_validator(mode="after")
    def _floor_is_below_cap(self) -> Self:
        if self.floor > self.cap:
            raise ValueError("the floor is above the cap")
        return self


class QuotaSection(_Section):
    """How much of each pool tenants and zones may keep cached. Public text is evicted by nobody, and so has a cap."""

    public_cap: Share = 0.25
    default: QuotaEntry = QuotaEntry()
    tenants: dict[str, QuotaEntry] = Field(default_factory=dict)
    zones: dict[str, QuotaEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_can_be(self) -> Self:
        for tenant in self.tenants:
            if not is_zone_name(tenant):
                raise ValueError("tenants: a key is no tenant's name")
        for path in self.zones:
            if Zone.parse(path).kind not in (ZoneKind.PLAN, ZoneKind.CASE):
                raise ValueError("zones: only a plan or a case has a quota of its own")
        floors = sum(entry.floor for entry in (*self.tenants.values(), *self.zones.values()))
        if self.default.floor:
            raise ValueError("default: a floor is one tenant's own; name the tenant")
        if floors + self.public_cap > 1.0:
            raise ValueError("floors and public_cap are more than the whole pool")
        return self


class TrustSection(_Section):
    """Who may enter, who may share what, and where it is recorded.

    `create_missing` is for one machine only: a local start makes the keys, and shares the shipped texts. Without
    `master_key_file` the master key is the environment's secret. Without `jwt` static keys alone open the door; without
    `policy_file` the shipped policy holds; without manifests no text is shared; without `audit` nothing is recorded;
    without `state_dir` purges are forgotten with the last ingress replica.
    """

    keys_file: Path = Field(strict=False)  # YAML has no paths, only strings
    master_key_file: Path | None = Field(default=None, strict=False)
    state_dir: Path | None = Field(default=None, strict=False, description="epochs and manifest floors, kept")
    create_missing: bool = False
    prewarm: bool = Field(default=True, description="shared texts are computed and pinned before traffic asks")
    prewarm_share: Share = Field(default=0.25, description="of a pool's blocks that pinned texts may hold")
    report_cached_tokens: bool = Field(default=False, description="of the caller's own zones, in usage")
    metrics_role: str | None = Field(default=None, description="who may read /metrics; absent: everybody")
    quotas: QuotaSection = QuotaSection()
    jwt: JwtSection | None = None
    policy_file: Path | None = Field(default=None, strict=False)
    policy_reload_s: float = Field(default=5.0, ge=0.1, description="between two looks at policy and manifests")
    manifests_dir: Path | None = Field(default=None, strict=False)
    manifest_keys_file: Path | None = Field(default=None, strict=False)
    audit: AuditSection | None = None

    @model_validator(mode="after")
    def _manifests_have_keys(self) -> Self:
        if (self.manifests_dir is None) != (self.manifest_keys_file is None):
            raise ValueError("manifests_dir and manifest_keys_file go together")
        if self.metrics_role is not None and not is_zone_name(self.metrics_role):
            raise ValueError("metrics_role is no role's name")
        if self.create_missing and self.master_key_file is None:
            raise ValueError("create_missing needs a master_key_file to make")
        return self

    def absolute(self) -> TrustSection:
        """The same with every path absolute."""
        update: dict[str, object] = {
            name: value.absolute() for name in type(self).model_fields if isinstance(value := getattr(self, name), Path)
        }
        if self.jwt is not None and self.jwt.jwks_file is not None:
            update["jwt"] = self.jwt.model_copy(update={"jwks_file": self.jwt.jwks_file.absolute()})
        if self.audit is not None:
            update["audit"] = self.audit.model_copy(update={"dir": self.audit.dir.absolute()})
        return self.model_copy(update=update)


class ClaimsSection(_Section):
    """How claims are reviewed."""

    plan: str = Field(default="synthetic-ppo", pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    max_tokens: int = Field(default=320, ge=16)
    max_concurrent_reviews: int = Field(default=16, ge=1)
    max_claims_per_call: int = Field(default=1000, ge=1)


class ZoneserveConfig(_Section):
    """A whole deployment."""

    mode: Literal["disaggregated", "monolithic"] = "disaggregated"
    model: ModelSection
    engine: EngineSection = EngineSection()
    prefill: PoolSection
    decode: PoolSection
    transfer: TransferSection = TransferSection()
    routing: RoutingSection = RoutingSection()
    ingress: IngressSection = IngressSection()
    trust: TrustSection
    claims: ClaimsSection = ClaimsSection()

    @model_validator(mode="after")
    def _pools_can_hold_one_request(self) -> Self:
        for name in ("prefill", "decode"):
            pool: PoolSection = getattr(self, name)
            slots = pool.num_blocks * self.engine.block_size
            if slots < self.model.max_model_len:
                raise ValueError(
                    f"{name}.num_blocks holds {slots} tokens, fewer than model.max_model_len "
                    f"{self.model.max_model_len}: a longest request could never run"
                )
        if self.engine.max_num_batched_tokens < self.engine.max_num_seqs:
            raise ValueError("engine.max_num_batched_tokens must give each of max_num_seqs decodes its token")
        return self


def require_context(config: ZoneserveConfig, max_position: int) -> None:
    """
    Raises:
        ConfigError: The configuration promises more context than the checkpoint, `max_position`, was made for.
    """
    if config.model.max_model_len > max_position:
        asked = config.model.max_model_len
        raise ConfigError(f"model.max_model_len: {asked} tokens are more than the {max_position} of the checkpoint")


def shipped_names() -> list[str]:
    """Of the configurations that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def find_config(name: Path) -> Path:
    """`name` itself, unless it is no file but the name of a shipped configuration, for example `local-monolithic`.

    Raises:
        ConfigError: Neither; a name is a bare word without an ending. The message lists those that are shipped.
    """
    if name.parent != Path() or name.suffix or name.exists():
        return name
    if name.name not in shipped_names():
        raise ConfigError(f"{name}: neither a file nor a shipped configuration, which are {', '.join(shipped_names())}")
    return BUNDLED / f"{name.name}.yaml"


def load_config(path: Path) -> ZoneserveConfig:
    """Read, check and freeze one YAML file; relative paths in it are taken from the working directory.

    Raises:
        ConfigError: Not readable, not YAML, an unknown key or a value out of range; names the key.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist is a ValueError
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the top level must be a mapping")
    return parse_config(document, source=str(path))


def parse_config(document: dict[str, object], *, source: str = "config") -> ZoneserveConfig:
    """Check a parsed document. Raises ConfigError as `load_config`."""
    try:
        return ZoneserveConfig.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'top level'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ConfigError(f"{source}: {faults}") from error
