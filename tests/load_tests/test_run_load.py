"""A load run counts as passed only when every kind of user was served and nothing failed."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from load_tests import local
from load_tests.run_load import find_faults, read_summary

GOOD = (
    ("GET", "/v1/models", 6),
    ("POST", "chat", 10),
    ("POST", "chat, streamed", 20),
    ("POST", "review", 4),
    ("TTFT", "chat, streamed", 20),
)


def entries(rows: Sequence[tuple[str, str, int]] = GOOD, **failures: int) -> list[dict[str, Any]]:
    return [
        {"type": kind, "name": name, "requests": count, "failures": failures.get(name, 0)} for kind, name, count in rows
    ]


def test_run_without_failures_passes() -> None:
    assert find_faults(entries(), 0) == []


def test_one_failure_fails_the_run() -> None:
    assert find_faults(entries(review=1), 1) == ["review: 1 of 4 failed"]


def test_kind_of_user_that_was_never_served_fails_the_run() -> None:
    assert find_faults([entry for entry in entries() if entry["name"] != "review"], 0) == [
        "review: no request succeeded"
    ]
    assert "review: no request succeeded" in find_faults(entries(review=4), 0)


def test_run_without_a_summary_fails(tmp_path: Path) -> None:
    assert len(find_faults(read_summary(tmp_path / "absent.json"), 0)) == 3


def test_status_of_locust_alone_fails_the_run() -> None:
    assert find_faults(entries(), 2) == ["locust ended with status 2; see locust.log"]


def test_server_gets_keys_of_its_own_that_only_the_owner_reads(tmp_path: Path) -> None:
    for _ in range(2):  # a second run replaces the files of the first
        prepared, key_files = local._prepare(tmp_path, local.LOCAL_CONFIG, 8123)
    key_file = key_files[local.PRINCIPAL["principal"]]
    settings = yaml.safe_load(prepared.read_text(encoding="utf-8"))
    assert settings["ingress"]["port"] == 8123
    assert settings["trust"]["create_missing"] is False
    for secret in (key_file, *(Path(settings["trust"][name]) for name in ("keys_file", "master_key_file"))):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert key_file.read_text(encoding="utf-8").strip() not in Path(settings["trust"]["keys_file"]).read_text()


def test_prepared_configuration_is_one_that_the_deployment_takes(tmp_path: Path) -> None:
    from deployments.config import load_config
    from deployments.trust.keyring import read_keyring
    from deployments.trust.principals import Principals

    prepared, key_files = local._prepare(tmp_path, local.LOCAL_CONFIG, 8123)
    config = load_config(prepared)
    assert read_keyring(config.trust.master_key_file).current
    key = key_files[local.PRINCIPAL["principal"]].read_text(encoding="utf-8").strip()
    principal = Principals.from_file(config.trust.keys_file).authenticate(f"Bearer {key}")
    assert principal is not None
    assert principal.zone.path == local.PRINCIPAL["zone"]
