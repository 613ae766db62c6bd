"""Who may do what in which zone: one YAML file of rules. The first rule that matches decides; none: denied.

Pure but for reading the file. No thread and no clock: the caller says when to look at the file again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.claims.model import canonical_sha256
from deployments.trust.principals import Name, Principal
from engine.zone import Zone, ZoneKind, is_zone_name

DEFAULT_POLICY = Path(__file__).with_name("default-policy.yaml")
MAX_POLICY_BYTES = 1 << 18
MAX_RULES = 1000
ANY = "*"
OWN_TENANT = "{tenant}"


class Verb(StrEnum):
    """What may be done in a zone."""

    READ = "read"  # reuse blocks that lie there
    WRITE = "write"  # put text of one's own there
    PIN = "pin"  # keep it resident
    PURGE = "purge"


SHARING = frozenset({Verb.READ, Verb.WRITE})


class PolicyFault(StrEnum):
    """Why a policy file is refused."""

    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    NOT_YAML = "not_yaml"  # also where a key stands twice
    INVALID = "invalid"  # an unknown key, verb, subject or zone


class PolicyError(Exception):
    """A policy file that cannot be used. The message names the file, the place and the fault."""

    def __init__(self, path: Path, fault: PolicyFault, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.fault = fault


@dataclass(frozen=True, slots=True)
class ZonePattern:
    """`public`, or the plans or cases of a tenant: `tenant/T/plan/P`, `tenant/T/case/C`.

    T is a name, `{tenant}` for the principal's own, or `*`; P and C are a name or `*`. Zones that are never cached
    (mixed, ephemeral) cannot be named: there is nothing in them to allow.
    """

    kind: ZoneKind
    tenant: str = ""
    name: str = ""

    @staticmethod
    def parse(text: str) -> ZonePattern:
        """
        Raises:
            ValueError: None of these forms. The message does not repeat it.
        """
        match text.split("/"):
            case ["public"]:
                return ZonePattern(ZoneKind.PUBLIC)
            case ["tenant", tenant, ("plan" | "case") as kind, name] if (
                tenant in (ANY, OWN_TENANT) or is_zone_name(tenant)
            ) and (name == ANY or is_zone_name(name)):
                return ZonePattern(ZoneKind[kind.upper()], tenant, name)
        raise ValueError("a zone pattern is public, tenant/T/plan/P or tenant/T/case/C with T a name, {tenant} or *")

    def matches(self, zone: Zone, own_tenant: str) -> bool:
        """True for a zone of this pattern, seen from a principal of `own_tenant`."""
        tenant = own_tenant if self.tenant == OWN_TENANT else self.tenant
        return (
            self.kind is zone.kind and (self.tenant == ANY or tenant == zone.tenant) and self.name in (ANY, zone.name)
        )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Subject(_Strict):
    """Whom a rule is about: all of what is given must hold. `*` in the file is everybody."""

    principal: Name | None = None
    tenant: Name | None = None
    role: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _star_is_everybody(cls, value: Any) -> Any:
        if value == ANY:
            return {}
        if isinstance(value, dict) and (not value or None in value.values()):  # must not come to mean everybody
            raise ValueError("a subject is '*', or names a principal with its tenant, a tenant or a role")
        return value

    @model_validator(mode="after")
    def _principal_has_a_tenant(self) -> Self:
        if self.principal is not None and self.tenant is None:
            raise ValueError("a principal is named together with its tenant: another tenant may have one of that name")
        return self

    def matches(self, principal: Principal) -> bool:
        """True if all of what is given holds of the principal."""
        return (
            self.principal in (None, principal.name)
            and self.tenant in (None, principal.tenant)
            and (self.role is None or self.role in principal.roles)
        )


_Verbs = Annotated[
    tuple[Annotated[Verb, Field(strict=False)], ...],
    Field(strict=False, max_length=len(Verb)),  # YAML has neither tuples nor enumerations
    AfterValidator(lambda verbs: tuple(sorted(set(verbs)))),
]


class Rule(_Strict):
    """Allows or denies some verbs to a subject in the zones of a pattern."""

    subject: Subject
    zone: str
    allow: _Verbs = ()
    deny: _Verbs = ()

    @field_validator("zone")
    @classmethod
    def _is_a_pattern(cls, zone: str) -> str:
        ZonePattern.parse(zone)
        return zone

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        if bool(self.allow) == bool(self.deny):
            raise ValueError("a rule has either allow or deny, with at least one verb")
        return self

    @cached_property
    def pattern(self) -> ZonePattern:
        return ZonePattern.parse(self.zone)

    def matches(self, principal: Principal, verb: Verb, zone: Zone) -> bool:
        return (
            (verb in self.allow or verb in self.deny)
            and self.subject.matches(principal)
            and self.pattern.matches(zone, principal.tenant)
        )


class DecisionReason(StrEnum):
    """What decided."""

    ALLOWED = "allowed"  # the rule
    DENIED = "denied"  # the rule
    NO_RULE = "no_rule"
    STRICT = "strict"  # the zone is not of the principal's tenant, and nothing is shared between tenants


@dataclass(frozen=True, slots=True)
class Decision:
    """One answer. `rule` counts from 0; `policy_digest` says of which policy."""

    allowed: bool
    verb: Verb
    zone: Zone
    rule: int | None
    reason: DecisionReason
    policy_digest: str


class Policy(_Strict):
    """A parsed policy file.

    `strict` shares nothing between tenants: whatever the rules say, nobody reads or writes outside the own tenant's
    zones, `public` included. Pin and purge share nothing and stay with the rules.
    """

    version: Literal[1]
    strict: bool = False
    rules: tuple[Rule, ...] = Field(strict=False, max_length=MAX_RULES)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: a change of layout or comments is none."""
        return canonical_sha256(self.model_dump(mode="json"))

    def decide(self, principal: Principal, verb: Verb, zone: Zone) -> Decision:
        """May the principal do this there?"""
        if self.strict and verb in SHARING and zone.tenant != principal.tenant:
            return Decision(False, verb, zone, None, DecisionReason.STRICT, self.digest)
        for index, rule in enumerate(self.rules):
            if rule.matches(principal, verb, zone):
                allowed = verb in rule.allow
                reason = DecisionReason.ALLOWED if allowed else DecisionReason.DENIED
                return Decision(allowed, verb, zone, index, reason, self.digest)
        return Decision(False, verb, zone, None, DecisionReason.NO_RULE, self.digest)


# --- the file ---


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that has a key twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_policy(path: Path) -> Policy:
    """
    Raises:
        PolicyError: It cannot be read or used.
    """
    return _parse(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise PolicyError(path, PolicyFault.UNREADABLE, error.strerror or "cannot be read") from error
    if len(data) > MAX_POLICY_BYTES:
        raise PolicyError(path, PolicyFault.TOO_LARGE, f"larger than {MAX_POLICY_BYTES} bytes")
    return data


def _parse(path: Path, data: bytes) -> Policy:
    try:
        return Policy.model_validate(yaml.load(data.decode(), _UniqueKeys))  # noqa: S506 - a SafeLoader
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "top level"
        detail = f"{where}: {fault['msg'].removeprefix('Value error, ')}"
        raise PolicyError(path, PolicyFault.INVALID, detail) from None
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise PolicyError(path, PolicyFault.NOT_YAML, f"not YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that does not exist is a ValueError
        raise PolicyError(path, PolicyFault.NOT_YAML, "not YAML") from None


class Reload(StrEnum):
    """What came of looking at the file once."""

    UNCHANGED = "unchanged"  # as at the last look, be it good or broken
    LOADED = "loaded"
    REFUSED = "refused"


class PolicyStore:
    """The policy in force. A file that breaks leaves the last good one in force and shows in `refusal`."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            PolicyError: There is no good policy to begin with.
        """
        self._path = path
        data = _read(path)
        self._policy = _parse(path, data)
        self._seen: object = _digest(data)
        self._refusal: PolicyError | None = None

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def refusal(self) -> PolicyError | None:
        """Why the file as it stands is not in force; None where it is."""
        return self._refusal

    def reload(self) -> Reload:
        """Look at the file again. The new policy takes the old one's place in one assignment; raises nothing.

        The file is read whole each time, for its size is bounded and a time stamp can miss a change.
        """
        try:
            data = _read(self._path)
        except PolicyError as error:
            return self._refuse(error, seen=error.fault)
        seen = _digest(data)
        if seen == self._seen:
            return Reload.UNCHANGED
        try:
            policy = _parse(self._path, data)
        except PolicyError as error:
            return self._refuse(error, seen)
        self._policy, self._seen, self._refusal = policy, seen, None
        return Reload.LOADED

    def _refuse(self, error: PolicyError, seen: object) -> Reload:
        if seen == self._seen:
            return Reload.UNCHANGED
        self._seen, self._refusal = seen, error
        return Reload.REFUSED


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
