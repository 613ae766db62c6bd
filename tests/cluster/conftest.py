"""Where the CRDs lie, and copies of the shipped manifests to break."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check import BASE_MANIFESTS
from deployments.settings import read_settings

ROOT = Path(__file__).parents[2]
SIBLING_CRDS = ROOT.parent / "shared" / "data" / "crds"

Mutation = Callable[[Any], None]


@pytest.fixture(scope="session")
def crds_or_none() -> Path | None:
    crd_dir = read_settings().crd_dir or SIBLING_CRDS
    return crd_dir if crd_dir.is_dir() else None


@pytest.fixture(scope="session")
def crds(crds_or_none: Path | None) -> Path:
    if crds_or_none is None:
        pytest.skip(f"KubeRay's CRDs are neither in ZONESERVE_CRD_DIR nor in {SIBLING_CRDS}")
    return crds_or_none


class ManifestCopy:
    """A copy of cluster/manifests that a test changes."""

    def __init__(self, directory: Path) -> None:
        self.root = Path(shutil.copytree(BASE_MANIFESTS.parent, directory / "manifests"))
        self.base = self.root / "base"

    def change(self, file: str, mutate: Mutation, index: int = 0) -> None:
        """Rewrite one object of a file of the base."""
        path = self.base / file
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        mutate(documents[index])
        path.write_text(yaml.safe_dump_all(documents, sort_keys=False), encoding="utf-8")

    def change_service(self, mutate: Mutation) -> None:
        self.change("rayservice.yaml", mutate)

    def change_serve_config(self, mutate: Mutation) -> None:
        def inner(service: Any) -> None:
            config = yaml.safe_load(service["spec"]["serveConfigV2"])
            mutate(config)
            service["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)

        self.change_service(inner)


@pytest.fixture
def manifests(tmp_path: Path) -> ManifestCopy:
    return ManifestCopy(tmp_path)
