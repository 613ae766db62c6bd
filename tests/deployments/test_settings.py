"""The environment is read in one place, once."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from deployments.app import REPLICA_ENVIRONMENT
from deployments.settings import SERVE_TRANSPORT, master_key_secret, prepare_ray_environment, read_settings

ROOT = Path(__file__).parents[2]
# Sets the transport's variables before its library is imported.
EXEMPT = {Path("deployments/settings.py"), Path("transfer/nixl_connector.py")}
NAMES = ("ZONESERVE_CACHE", "ZONESERVE_MODEL_CACHE", "ZONESERVE_CRD_DIR", "ZONESERVE_MASTER_KEY", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_models_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert read_settings().model_cache == Path("/home/somebody/.cache/zoneserve/models")
    assert read_settings().crd_dir is None


def test_cache_home_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert read_settings().cache == Path("/caches/zoneserve")
    assert read_settings().model_cache == Path("/caches/zoneserve/models")


def test_one_variable_moves_everything_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("ZONESERVE_CACHE", "/kept")
    assert read_settings().cache == Path("/kept")
    assert read_settings().model_cache == Path("/kept/models")


def test_own_variables_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("ZONESERVE_CACHE", "/kept")
    monkeypatch.setenv("ZONESERVE_MODEL_CACHE", "/models")
    monkeypatch.setenv("ZONESERVE_CRD_DIR", "/crds")
    assert read_settings().model_cache == Path("/models")
    assert read_settings().crd_dir == Path("/crds")


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in NAMES:
        monkeypatch.setenv(name, "")
    assert read_settings().cache == Path("/home/somebody/.cache/zoneserve")
    assert read_settings().model_cache == Path("/home/somebody/.cache/zoneserve/models")
    assert read_settings().crd_dir is None


def test_master_key_is_handed_out_alone_and_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert master_key_secret() is None
    monkeypatch.setenv("ZONESERVE_MASTER_KEY", "ab" * 32)
    assert master_key_secret() == "ab" * 32
    assert "ab" * 32 not in repr(read_settings())


def test_ray_finds_this_interpreters_tools_and_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin", "RAY_DEDUP_LOGS": "0"})
    prepare_ray_environment()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/usr/bin"
    assert os.environ["RAY_DEDUP_LOGS"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_serves_processes_get_their_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin"})
    prepare_ray_environment()
    assert SERVE_TRANSPORT.items() <= os.environ.items()
    assert SERVE_TRANSPORT.items() <= REPLICA_ENVIRONMENT.items()


def test_preparing_twice_changes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin"})
    prepare_ray_environment()
    once = dict(os.environ)
    prepare_ray_environment()
    assert dict(os.environ) == once


def test_no_other_module_reads_the_environment() -> None:
    offenders = []
    for package in ("engine", "transfer", "cluster", "deployments"):
        for path in (ROOT / package).rglob("*.py"):
            if path.relative_to(ROOT) in EXEMPT:
                continue
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            if names & {"environ", "getenv", "putenv"}:
                offenders.append(str(path.relative_to(ROOT)))
    assert not offenders
