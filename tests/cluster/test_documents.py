"""Manifests are read as they would be applied, or not at all."""

from pathlib import Path

import pytest
import yaml

from cluster.documents import KUSTOMIZATION, MAX_FILE_BYTES, ManifestError, load_yaml, read_documents

HEADER = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
OBJECT = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\nlist: [x, y]\n"


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return directory


def patched(tmp_path: Path, operations: str) -> dict[str, object]:
    body = HEADER + "resources: [a.yaml]\npatches: [{path: p.yaml, target: {kind: ServiceAccount, name: a}}]\n"
    (document,) = read_documents(write(tmp_path, kustomization=body, a=OBJECT, p=operations))
    return document.body


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as error:
        read_documents(path)
    return str(error.value)


def test_every_object_of_a_file_is_read_and_empty_ones_are_not(tmp_path: Path) -> None:
    directory = write(tmp_path, a=f"{OBJECT}---\n---\n{OBJECT.replace('name: a', 'name: b')}")
    assert [document.title for document in read_documents(directory / "a.yaml")] == [
        "ServiceAccount/a",
        "ServiceAccount/b",
    ]


def test_directory_without_kustomization_is_all_its_files(tmp_path: Path) -> None:
    assert len(read_documents(write(tmp_path, a=OBJECT, b=OBJECT))) == 2


def test_kustomization_sets_the_namespace_but_not_on_a_namespace(tmp_path: Path) -> None:
    namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: z}\n"
    body = HEADER + "namespace: z\nresources: [a.yaml, n.yaml]\n"
    account, own = read_documents(write(tmp_path, kustomization=body, a=OBJECT, n=namespace))
    assert account.body["metadata"] == {"name": "a", "namespace": "z"}
    assert own.body["metadata"] == {"name": "z"}


def test_kustomization_includes_another(tmp_path: Path) -> None:
    write(tmp_path / "base", kustomization=HEADER + "resources: [a.yaml]\n", a=OBJECT)
    write(tmp_path / "top", kustomization=HEADER + "resources: [../base]\n")
    assert [document.name for document in read_documents(tmp_path / "top")] == ["a"]


def test_patch_adds_replaces_and_removes(tmp_path: Path) -> None:
    operations = """
- {op: add, path: /metadata/labels, value: {a/b: c}}
- {op: replace, path: /metadata/labels/a~1b, value: d}
- {op: add, path: /list/-, value: z}
- {op: add, path: /list/0, value: w}
- {op: remove, path: /list/1}
- {op: replace, path: /list/1, value: q}
- {op: remove, path: /kind}
"""
    assert patched(tmp_path, operations) == {
        "apiVersion": "v1",
        "metadata": {"name": "a", "labels": {"a/b": "d"}},
        "list": ["w", "q", "z"],
    }


@pytest.mark.parametrize(
    "operation",
    [
        "{op: replace, path: /absent, value: 1}",
        "{op: remove, path: /absent}",
        "{op: add, path: /absent/key, value: 1}",
        "{op: add, path: /list/9, value: 1}",
        "{op: remove, path: /list/x}",
        "{op: move, path: /kind, from: /apiVersion}",
        "{path: /kind}",
        "just text",
    ],
)
def test_patch_that_cannot_be_applied_is_refused(operation: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be applied"):
        patched(tmp_path, f"- {operation}\n")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("resources: [a.yaml]\nimages: []\n", "images: is a kustomization key that this check does not understand"),
        ("resources: [b.yaml]\n", "there is no file b.yaml"),
        ("resources: [https://example.org/a.yaml]\n", "is not a local file"),
        ("resources: a.yaml\n", "must be a list"),
        ("resources: []\n", "does not list a.yaml, which lies beside it"),
        ("namespace: 1\nresources: [a.yaml]\n", "must be a string"),
        ("resources: [a.yaml]\npatches: [{path: a.yaml}]\n", "must have the keys path and target"),
        (
            "resources: [a.yaml]\npatches: [{path: a.yaml, target: {kind: Pod, name: a}}]\n",
            "matches no object: Pod/a",
        ),
        (
            "resources: [a.yaml]\npatches: [{path: a.yaml, target: {kind: ServiceAccount, name: a}}]\n",
            "must be one list",
        ),
        (
            "resources: [a.yaml]\npatches: [{path: a.yaml, target: {kind: ServiceAccount}}]\n",
            "must have the keys kind and name",
        ),
    ],
)
def test_kustomization_outside_the_subset_is_refused(body: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write(tmp_path, kustomization=HEADER + body, a=OBJECT))


def test_kustomization_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert "Kustomization" in refusal(write(tmp_path, kustomization="kind: Component\n"))


def test_kustomization_that_includes_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "loop", kustomization=HEADER + "resources: [../loop]\n")
    assert "nested deeper" in refusal(tmp_path / "loop")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2\n", "the key 'a' is given twice"),
        ("a: {b: 1, b: 2}\n", "the key 'b' is given twice"),
        ("a: [\n", "not valid YAML"),
        ("- 1\n", "is a list, not an object"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
        ("", "holds no Kubernetes object"),
    ],
)
def test_file_that_is_no_manifest_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write(tmp_path, a=text) / "a.yaml")


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "a.yaml")


def test_oversized_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: " + "x" * MAX_FILE_BYTES, encoding="utf-8")
    assert "larger than" in refusal(tmp_path / "a.yaml")


def test_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / KUSTOMIZATION)


def test_merge_keys_are_not_repeated_keys() -> None:
    assert load_yaml("base: &b {x: 1}\nother: {<<: *b, y: 2}\n")["other"] == {"x": 1, "y": 2}


def test_several_documents_are_no_single_one() -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml("a: 1\n---\nb: 1\n")
