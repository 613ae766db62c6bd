"""Checks Kubernetes manifests strictly and offline: schema first, then whether the parts fit one another."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import rules
from cluster.documents import Document, ManifestError, flatten, load_yaml, read_documents
from cluster.object_schema import CrdError, core_validator, crd_validator, violations
from cluster.serve_schema import check_serve_config

BASE_MANIFESTS = Path(__file__).parent / "manifests" / "base"
RAY_SERVICE = ("ray.io/v1", "RayService")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    file: Path
    path: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.file}: {self.path}: {self.sentence}" if self.path else f"{self.file}: {self.sentence}"


def check_manifests(path: Path, crd_dir: Path | None) -> list[Finding]:
    """Check every object that `path` describes.

    Args:
        path: A kustomization directory, a directory of YAML files, or one file.
        crd_dir: Directory of CustomResourceDefinition files. None leaves the RayService unchecked
            against its schema; every other check still runs.

    Returns:
        Findings in the order of the objects; none means that the manifests may be applied.
    """
    try:
        documents = read_documents(path)
    except ManifestError as error:
        return [Finding(error.file, error.path, error.sentence)]
    findings: list[Finding] = []
    serve_configs: dict[str, Any] = {}
    for document in documents:
        findings += _check_schema(document, crd_dir)
        if (document.api_version, document.kind) == RAY_SERVICE:
            serve_config, problems = _check_serve_config(document)
            findings += problems
            serve_configs[document.title] = serve_config
    # The rules read the objects by their shape, so they run only on objects whose shape is right.
    if findings:
        return findings
    try:
        return list(_check_rules(documents, serve_configs))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if crd_dir is not None:
            raise
        sentence = f"a part is not shaped as its kind demands ({flatten(error)}); the CRDs would say which"
        return [Finding(path, "", sentence)]


def _check_schema(document: Document, crd_dir: Path | None) -> Iterator[Finding]:
    key = (document.api_version, document.kind)
    validator = core_validator(*key)
    if validator is None and key == RAY_SERVICE:
        if crd_dir is None:
            return
        try:
            validator = crd_validator(crd_dir, *key)
        except (CrdError, OSError) as error:
            yield Finding(document.file, document.title, flatten(error))
            return
        if validator is None:
            yield Finding(
                document.file, document.title, f"no CRD in {crd_dir} defines {document.api_version} RayService"
            )
            return
    if validator is None:
        named = " ".join(part for part in key if part) or "an object without apiVersion and kind"
        yield Finding(document.file, document.title, f"is {named}, a kind that this check does not know")
        return
    for place, sentence in violations(validator, document.body):
        yield Finding(document.file, _at(document, place), sentence)


def _check_serve_config(document: Document) -> tuple[Any, list[Finding]]:
    spec = document.body.get("spec")
    text = spec.get("serveConfigV2") if isinstance(spec, dict) else None
    place = _at(document, "spec.serveConfigV2")
    if not isinstance(text, str):
        return None, [Finding(document.file, place, "is missing: the service would serve nothing")]
    try:
        config = load_yaml(text)
    except yaml.YAMLError as error:
        return None, [Finding(document.file, place, f"is not valid YAML: {flatten(error)}")]
    problems = check_serve_config(config)
    return config, [Finding(document.file, f"{place} | {inner}", sentence) for inner, sentence in problems]


def _check_rules(documents: list[Document], serve_configs: dict[str, Any]) -> Iterator[Finding]:
    manifests = rules.Manifests.of(documents, serve_configs)
    for rule in rules.ALL:
        for document, place, sentence in rule(manifests):
            yield Finding(document.file, _at(document, place), sentence)


def _at(document: Document, place: str) -> str:
    return f"{document.title} {place}" if place else document.title
