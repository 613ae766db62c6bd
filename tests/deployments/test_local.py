"""What a local start signs and checks before it starts anything."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.claims.plan import load_plan
from deployments.claims.prompt import shared_segments
from deployments.config import ConfigError, ZoneserveConfig
from deployments.local import SIGNING_KEY_NAME, _prepare_trust
from deployments.trust.key_files import KeyFileError
from deployments.trust.manifest_keys import TrustedKeys
from deployments.trust.manifest_set import ManifestSet
from engine.zone import Zone
from tests.deployments.support import local_config, write_yaml


def config_in(folder: Path, *tenants: str, **changes: Any) -> ZoneserveConfig:
    entries = [
        {"sha256": hashlib.sha256(tenant.encode()).hexdigest(), "principal": "p", "tenant": tenant}
        for tenant in tenants
    ]
    trust = {
        "keys_file": str(write_yaml(folder / "keys.yaml", {"keys": entries})),
        "master_key_file": str(folder / "master.key"),
        "manifests_dir": str(folder / "manifests"),
        "manifest_keys_file": str(folder / "trusted.yaml"),
        "audit": {"dir": str(folder / "audit")},
    }
    return local_config(trust=trust | changes)


def shared(folder: Path) -> ManifestSet:
    manifests = ManifestSet(folder / "manifests", TrustedKeys.from_file(folder / "trusted.yaml"), time.time)
    assert manifests.reload() == ()
    return manifests


def test_exactly_the_shipped_texts_are_shared_with_the_tenants_of_the_keys_file(tmp_path: Path) -> None:
    _prepare_trust(config_in(tmp_path, "acme", "other"))
    listed = {
        (zone.path, item.id, item.sha256)
        for zone, signed in shared(tmp_path).in_force().items()
        for item in signed.manifest.segments
    }
    plan = load_plan("synthetic-ppo")
    assert listed == {
        (Zone.parse(segment.zone).path, segment.id, segment.content_digest)
        for tenant in ("acme", "other")
        for segment in shared_segments(tenant, plan)
    }
    assert (tmp_path / SIGNING_KEY_NAME).stat().st_mode & 0o077 == 0


def test_a_second_start_signs_nothing_and_a_new_tenant_is_added(tmp_path: Path) -> None:
    _prepare_trust(config_in(tmp_path, "acme"))
    first = {path.name: path.read_bytes() for path in (tmp_path / "manifests").glob("*.json")}
    _prepare_trust(config_in(tmp_path, "acme"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "manifests").glob("*.json")} == first
    _prepare_trust(config_in(tmp_path, "acme", "other"))
    added = {path.name for path in (tmp_path / "manifests").glob("*.json")} - first.keys()
    assert added == {"tenant..other..plan..synthetic-ppo.r1.json"}
    assert Zone.parse("tenant/other/plan/synthetic-ppo") in shared(tmp_path).in_force()


def test_without_leave_to_make_anything_nothing_is_signed(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"trusted\.yaml"):
        _prepare_trust(config_in(tmp_path, "acme", create_missing=False))
    write_yaml(tmp_path / "trusted.yaml", {"keys": []})
    _prepare_trust(config_in(tmp_path, "acme", create_missing=False))
    assert not (tmp_path / "manifests").exists()
    _prepare_trust(config_in(tmp_path, "acme", manifests_dir=None, manifest_keys_file=None))
    assert not (tmp_path / SIGNING_KEY_NAME).exists()


def test_what_a_replica_could_only_refuse_is_refused_here(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"version": 2, "rules": []}))
    with pytest.raises(ConfigError, match=r"policy\.yaml: version"):
        _prepare_trust(config_in(tmp_path, "acme", policy_file=str(tmp_path / "policy.yaml")))
    (tmp_path / "audit").mkdir(mode=0o700)
    (tmp_path / "audit").chmod(0o755)
    with pytest.raises(ConfigError, match=r"audit directory must be its writer's own"):
        _prepare_trust(config_in(tmp_path, "acme"))
    (tmp_path / "audit").chmod(0o700)
    (tmp_path / "manifests").write_text("in the way")
    with pytest.raises(ConfigError, match="manifests: the shipped texts cannot be shared"):
        _prepare_trust(config_in(tmp_path, "acme"))
