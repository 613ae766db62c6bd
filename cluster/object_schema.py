"""Closed JSON schemas for Kubernetes objects: from a CRD's openAPIV3Schema, and of the few core kinds we ship.

Closed: a key that the schema does not name is an error, where the API server would drop it without a word.
Not checked: CEL rules (`x-kubernetes-validations`) and number formats.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from cluster.documents import flatten, load_yaml

_KEPT_KEYWORDS = frozenset(
    {"type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "required"}
)
_COMBINATORS = frozenset({"anyOf", "allOf", "oneOf"})
_STRUCTURE = frozenset({"properties", "items", "additionalProperties", "nullable"})
_IGNORED_KEYWORDS = frozenset(
    {
        "description", "default", "format", "title", "example",
        "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
        "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource",
    }
)  # fmt: skip


class CrdError(Exception):
    """A CRD file cannot be used. The message names the file and what is wrong."""


Schema = dict[str, Any]


def _closed(required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_STRING: Schema = {"type": "string", "minLength": 1}
_STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_BOOLEAN: Schema = {"type": "boolean"}
_INT_OR_STRING: Schema = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+%$|^[a-z0-9-]+$"}]
}
_DNS_NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
_LABELS: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$"},
}
_METADATA = _closed(("name",), name=_DNS_NAME, namespace=_DNS_NAME, labels=_LABELS, annotations=_STRINGS)

_LABEL_SELECTOR = _closed(
    matchLabels=_LABELS,
    matchExpressions=_list(
        _closed(
            ("key", "operator"),
            key=_STRING,
            operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
            values=_list({"type": "string"}),
        )
    ),
)
_POLICY_PEER = _closed(
    podSelector=_LABEL_SELECTOR,
    namespaceSelector=_LABEL_SELECTOR,
    ipBlock=_closed(("cidr",), cidr=_STRING),
)
_POLICY_PORT = _closed(
    port=_INT_OR_STRING,
    endPort={"type": "integer", "minimum": 1, "maximum": 65535},
    protocol={"enum": ["TCP", "UDP", "SCTP"]},
)


def _object(api_version: str, kind: str, required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return _closed(
        ("apiVersion", "kind", "metadata", *required),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=_METADATA,
        **properties,
    )


CORE_SCHEMAS: Mapping[tuple[str, str], Schema] = {
    ("v1", "Namespace"): _object("v1", "Namespace"),
    ("v1", "ConfigMap"): _object("v1", "ConfigMap", ("data",), data=_STRINGS, immutable=_BOOLEAN),
    ("v1", "ServiceAccount"): _object("v1", "ServiceAccount", automountServiceAccountToken=_BOOLEAN),
    ("networking.k8s.io/v1", "NetworkPolicy"): _object(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        ("spec",),
        spec=_closed(
            ("podSelector", "policyTypes"),
            podSelector=_LABEL_SELECTOR,
            policyTypes=_list({"enum": ["Ingress", "Egress"]}),
            ingress=_list(_closed(**{"ports": _list(_POLICY_PORT), "from": _list(_POLICY_PEER)})),
            egress=_list(_closed(ports=_list(_POLICY_PORT), to=_list(_POLICY_PEER))),
        ),
    ),
    ("policy/v1", "PodDisruptionBudget"): _object(
        "policy/v1",
        "PodDisruptionBudget",
        ("spec",),
        spec=_closed(
            ("selector",),
            selector=_LABEL_SELECTOR,
            minAvailable=_INT_OR_STRING,
            maxUnavailable=_INT_OR_STRING,
            unhealthyPodEvictionPolicy={"enum": ["IfHealthyBudget", "AlwaysAllow"]},
        ),
    ),
}
"""Schemas of the core kinds this project ships, by (apiVersion, kind). A subset of each kind: its closed form
refuses what the project does not use."""


def close(schema: Mapping[str, Any], where: str = "") -> Schema:
    """Turn an openAPIV3Schema into a closed JSON schema.

    Raises:
        CrdError: A keyword is unknown, so that something would go unchecked.
    """
    unknown = set(schema) - _KEPT_KEYWORDS - _COMBINATORS - _STRUCTURE - _IGNORED_KEYWORDS
    if unknown:
        raise CrdError(
            f"{where or 'the schema'} uses the keyword {sorted(unknown)[0]!r}, which this check does not know"
        )
    closed: Schema = {key: schema[key] for key in _KEPT_KEYWORDS & set(schema)}
    for key in _COMBINATORS & set(schema):
        closed[key] = [close(branch, f"{where}/{key}") for branch in schema[key]]
    if "items" in schema:
        closed["items"] = close(schema["items"], f"{where}[]")
    if "properties" in schema:
        closed["properties"] = {key: close(value, f"{where}/{key}") for key, value in schema["properties"].items()}
    closed |= _additional_properties(schema, where)
    if schema.get("nullable") and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]
    return closed


def _additional_properties(schema: Mapping[str, Any], where: str) -> Schema:
    extra = schema.get("additionalProperties")
    if isinstance(extra, Mapping):
        return {"additionalProperties": close(extra, f"{where}{{}}")}
    is_open = extra is True or schema.get("x-kubernetes-preserve-unknown-fields") is True
    if is_open or schema.get("type") != "object":
        return {}
    return {"additionalProperties": False}


def crd_validator(crd_dir: Path, api_version: str, kind: str) -> Draft202012Validator | None:
    """The closed validator for a custom kind; None when no CRD in `crd_dir` defines it.

    Raises:
        CrdError: A CRD is unreadable or does not serve `api_version`.
    """
    group, _, version = api_version.rpartition("/")
    for file in sorted(crd_dir.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        # A CRD file has a megabyte; only the one that can define the kind is worth parsing.
        if f"kind: {kind}\n" in text and f"group: {group}\n" in text:
            validator = _validator_from(file, file.stat().st_mtime_ns, group, version, kind)
            if validator is not None:
                return validator
    return None


@lru_cache(maxsize=8)
def _validator_from(file: Path, _mtime_ns: int, group: str, version: str, kind: str) -> Draft202012Validator | None:
    try:
        crd = load_yaml(file.read_text(encoding="utf-8"))
        spec = crd["spec"]
        if spec["group"] != group or spec["names"]["kind"] != kind:
            return None
        served = {entry["name"]: entry["schema"]["openAPIV3Schema"] for entry in spec["versions"] if entry["served"]}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise CrdError(f"{file} is not a readable CRD: {flatten(error)}") from error
    if version not in served:
        raise CrdError(f"{file} does not serve {group}/{version} {kind}; it serves {', '.join(sorted(served))}")
    schema = close(served[version])
    schema["properties"] |= {
        "metadata": _METADATA,
        "apiVersion": {"const": f"{group}/{version}"},
        "kind": {"const": kind},
    }
    schema["properties"].pop("status", None)  # written by the operator, never by a manifest
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft202012Validator(schema)


def core_validator(api_version: str, kind: str) -> Draft202012Validator | None:
    """The closed validator for a core kind; None when this project ships no such kind."""
    schema = CORE_SCHEMAS.get((api_version, kind))
    return None if schema is None else Draft202012Validator(schema)


def violations(validator: Draft202012Validator, body: object) -> Iterator[tuple[str, str]]:
    """Yield (path, sentence) for each thing in `body` that the schema refuses."""
    for error in validator.iter_errors(body):
        yield from _explain(error)


def _explain(error: ValidationError) -> Iterator[tuple[str, str]]:
    path = join_path(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
        known: Mapping[str, object] = error.schema.get("properties", {})
        for key in error.instance if isinstance(error.instance, Mapping) else ():
            if key not in known:
                yield join_path([*error.absolute_path, key]), "is a key that the schema does not know"
    elif error.validator == "required":
        yield path, f"{error.message.split(' ')[0]} is missing"
    else:
        yield path, _shorten(error.message)


def join_path(parts: Any) -> str:
    """`["spec", "groups", 0, "name"]` as `spec.groups[0].name`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shorten(message: str, limit: int = 200) -> str:
    return message if len(message) <= limit else f"{message[: limit - 3]}..."
