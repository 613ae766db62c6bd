"""Reads Kubernetes manifests from files: plain YAML, or what a small kustomization lists.

Not a kustomize: `namespace`, `resources` and JSON 6902 `patches` are understood, every other key is refused,
so nothing is checked in another shape than the one that is applied.
"""

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML was built without libyaml: slower, same result
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

MAX_FILE_BYTES = 4 * 2**20
MAX_KUSTOMIZATION_DEPTH = 8
KUSTOMIZATION = "kustomization.yaml"
CLUSTER_SCOPED_KINDS = frozenset({"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"})


class ManifestError(Exception):
    """A file cannot be read as manifests. `file` names it, `path` the place in it, `sentence` what is wrong."""

    def __init__(self, file: Path, path: str, sentence: str) -> None:
        super().__init__(f"{file}: {path}: {sentence}" if path else f"{file}: {sentence}")
        self.file = file
        self.path = path
        self.sentence = sentence


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a manifest file, after patches."""

    file: Path
    index: int
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", ""))

    @property
    def api_version(self) -> str:
        return str(self.body.get("apiVersion", ""))

    @property
    def name(self) -> str:
        metadata = self.body.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""

    @property
    def title(self) -> str:
        """How a finding names the object, for example `RayService/zoneserve`."""
        return f"{self.kind or 'object'}/{self.name or self.index}"


def read_documents(path: Path) -> list[Document]:
    """Read every object that `path` describes.

    Args:
        path: A YAML file, a directory with a kustomization, or a directory of YAML files.

    Raises:
        ManifestError: The path is missing or holds no object; a file is not valid YAML, repeats a key, or is no object;
            a kustomization uses a key or a patch this reader does not know.
    """
    if path.is_dir():
        found = (
            _read_kustomization(path, depth=0)
            if (path / KUSTOMIZATION).is_file()
            else [document for file in sorted(path.glob("*.yaml")) for document in _read_file(file)]
        )
    elif path.is_file():
        found = _read_file(path)
    else:
        raise ManifestError(path, "", "there is no such file or directory")
    if not found:
        raise ManifestError(path, "", "holds no Kubernetes object")
    return found


def load_yaml(text: str) -> Any:
    """Parse one YAML document; a repeated key is an error, as it is for the Kubernetes API server.

    Raises:
        yaml.YAMLError: The text is not YAML, holds several documents, or repeats a key.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _StrictLoader(_SafeLoader):
    """Safe loading without last-key-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _read_file(file: Path) -> list[Document]:
    documents = []
    for index, body in enumerate(_load_all(file)):
        if body is None:
            continue
        if not isinstance(body, dict):
            raise ManifestError(file, f"document {index}", f"is a {type(body).__name__}, not an object")
        documents.append(Document(file, index, body))
    return documents


def _load_all(file: Path) -> list[Any]:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ManifestError(file, "", f"is larger than {MAX_FILE_BYTES} bytes")
        loader = _StrictLoader(file.read_text(encoding="utf-8"))
        try:
            return list(_iterate(loader))
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(file, "", f"cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ManifestError(file, "", f"is not valid YAML: {flatten(error)}") from error


def _iterate(loader: Any) -> Iterator[Any]:
    while loader.check_data():
        yield loader.get_data()


def flatten(error: Exception) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


def _read_kustomization(directory: Path, depth: int) -> list[Document]:
    file = directory / KUSTOMIZATION
    if depth >= MAX_KUSTOMIZATION_DEPTH:
        raise ManifestError(file, "resources", f"is nested deeper than {MAX_KUSTOMIZATION_DEPTH} kustomizations")
    body = _kustomization_body(file)
    documents: list[Document] = []
    for index, entry in enumerate(_list_of(file, body, "resources")):
        documents += _read_resource(directory, f"resources[{index}]", entry, depth)
    _refuse_unlisted_files(directory, body)
    for index, patch in enumerate(_list_of(file, body, "patches")):
        documents = _apply_patch(directory, f"patches[{index}]", patch, documents)
    namespace = body.get("namespace")
    return [_with_namespace(document, namespace) for document in documents] if namespace else documents


def _kustomization_body(file: Path) -> dict[str, Any]:
    bodies = [body for body in _load_all(file) if body is not None]
    if len(bodies) != 1 or not isinstance(bodies[0], dict):
        raise ManifestError(file, "", "must hold exactly one object")
    body: dict[str, Any] = bodies[0]
    if body.get("kind") != "Kustomization" or body.get("apiVersion") != "kustomize.config.k8s.io/v1beta1":
        raise ManifestError(file, "kind", "must be kustomize.config.k8s.io/v1beta1 Kustomization")
    unknown = sorted(set(body) - {"apiVersion", "kind", "namespace", "resources", "patches"})
    if unknown:
        raise ManifestError(file, str(unknown[0]), "is a kustomization key that this check does not understand")
    if not isinstance(body.get("namespace", ""), str):
        raise ManifestError(file, "namespace", "must be a string")
    return body


def _list_of(file: Path, body: dict[str, Any], key: str) -> list[Any]:
    entries = body.get(key, [])
    if not isinstance(entries, list):
        raise ManifestError(file, key, "must be a list")
    return entries


def _read_resource(directory: Path, path: str, entry: Any, depth: int) -> list[Document]:
    file = directory / KUSTOMIZATION
    if not isinstance(entry, str) or "://" in entry:
        raise ManifestError(file, path, f"{entry!r} is not a local file or directory")
    target = directory / entry
    if target.is_dir():
        return _read_kustomization(target, depth + 1)
    if not target.is_file():
        raise ManifestError(file, path, f"there is no file {entry}")
    return _read_file(target)


def _refuse_unlisted_files(directory: Path, body: dict[str, Any]) -> None:
    """A manifest that lies beside the kustomization but is not listed would silently not be applied."""
    listed = set(map(str, body.get("resources", [])))
    listed |= {str(patch.get("path")) for patch in body.get("patches", []) if isinstance(patch, dict)}
    for file in sorted(directory.glob("*.yaml")):
        if file.name != KUSTOMIZATION and file.name not in listed:
            raise ManifestError(
                directory / KUSTOMIZATION, "resources", f"does not list {file.name}, which lies beside it"
            )


def _with_namespace(document: Document, namespace: str) -> Document:
    if document.kind in CLUSTER_SCOPED_KINDS or not isinstance(document.body.get("metadata"), dict):
        return document
    body = {**document.body, "metadata": {**document.body["metadata"], "namespace": namespace}}
    return replace(document, body=body)


def _apply_patch(directory: Path, path: str, patch: Any, documents: list[Document]) -> list[Document]:
    file = directory / KUSTOMIZATION
    if not isinstance(patch, dict) or set(patch) != {"path", "target"} or not isinstance(patch["target"], dict):
        raise ManifestError(file, path, "must have the keys path and target, and no other")
    target = patch["target"]
    if set(target) != {"kind", "name"}:
        raise ManifestError(file, f"{path}.target", "must have the keys kind and name, and no other")
    matching = [d for d in documents if d.kind == target["kind"] and d.name == target["name"]]
    if not matching:
        raise ManifestError(file, f"{path}.target", f"matches no object: {target['kind']}/{target['name']}")
    patch_file = directory / str(patch["path"])
    operations = _load_all(patch_file)
    if len(operations) != 1 or not isinstance(operations[0], list):
        raise ManifestError(patch_file, "", "must be one list of JSON 6902 operations")
    return [
        _patched(document, patch_file, operations[0]) if document in matching else document for document in documents
    ]


def _patched(document: Document, patch_file: Path, operations: list[Any]) -> Document:
    body = copy.deepcopy(document.body)
    for index, operation in enumerate(operations):
        try:
            _apply_operation(body, operation)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ManifestError(patch_file, f"[{index}]", f"cannot be applied: {flatten(error)}") from error
    return replace(document, body=body)


def _apply_operation(body: dict[str, Any], operation: Any) -> None:
    """Apply one `add`, `replace` or `remove` (RFC 6902) in place."""
    kind, pointer = operation["op"], operation["path"]
    if kind not in {"add", "replace", "remove"}:
        raise ValueError(f"the operation {kind!r} is not add, replace or remove")
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    target: Any = body
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    if isinstance(target, list):
        _apply_to_list(target, kind, last, operation)
    elif kind == "remove":
        del target[last]
    else:
        if kind == "replace" and last not in target:
            raise KeyError(f"{pointer} does not exist")
        target[last] = operation["value"]


def _apply_to_list(target: list[Any], kind: str, last: str, operation: Any) -> None:
    index = len(target) if last == "-" else int(last)
    if kind == "add":
        if index > len(target):
            raise IndexError(f"{operation['path']} is past the end")
        target.insert(index, operation["value"])
    elif kind == "replace":
        target[index] = operation["value"]
    else:
        del target[index]
