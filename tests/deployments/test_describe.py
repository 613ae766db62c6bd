"""What `zoneserve check` says of a configuration, without a model on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deployments import describe as module
from deployments.config import ConfigError, ZoneserveConfig
from deployments.describe import describe
from engine import model_store
from engine.errors import CheckpointError
from engine.kv_cache import KVCacheLayout
from tests.deployments.support import local_config, local_document

MODEL = SimpleNamespace(
    architecture="llama", num_layers=30, num_kv_heads=3, head_dim=64, max_position=8192,
    hidden_size=576, intermediate_size=1536, q_size=576,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _model_and_machine_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 7})
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(model_store, "resolve", lambda name, cache: Path("/models") / f"{name}.gguf")
    monkeypatch.setattr(module, "load_checkpoint", lambda path: SimpleNamespace(config=MODEL))


def text_of(config: ZoneserveConfig) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(describe(config, Path("some.yaml")))
    return capture.get()


def row(text: str, name: str) -> list[str]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    (found,) = [cells for cells in rows if cells and cells[0] == name]
    return found


def test_facts_are_those_of_the_configuration() -> None:
    text = text_of(local_config())
    assert "some.yaml: valid" in text
    assert row(text, "mode") == ["mode", "disaggregated"]
    assert row(text, "context") == ["context", "8192 tokens"]
    assert row(text, "endpoint") == ["endpoint", "http://127.0.0.1:8000"]
    assert row(text, "in flight at most") == ["in flight at most", "64 generations an ingress"]
    assert "smollm2-135m-instruct (llama, bfloat16) from /models/smollm2.gguf" in text


def test_memory_is_blocks_times_the_layouts_bytes() -> None:
    text = text_of(local_config())
    layout = KVCacheLayout(30, 3, 64, 16, "bfloat16", "pairs")
    assert layout.block_bytes == 360 * 1024
    assert row(text, "KV block") == ["KV block", "16 tokens, 360 KiB"]
    assert row(text, "KV layout") == ["KV layout", layout.fingerprint()[:16]]
    assert row(text, "prefill") == ["prefill", "1", "1", "0", "1024", "360 MiB", "16384"]
    assert row(text, "decode") == ["decode", "1", "1", "1", "2048", "720 MiB", "32768"]
    assert row(text, "ingress") == ["ingress", "1", "1", "-", "-", "-", "-"]


def test_replicas_and_threads_are_shown_for_each_pool() -> None:
    text = text_of(local_config(prefill={"replicas": 3, "num_threads": 8, "cpus": []}, ingress={"replicas": 2}))
    assert row(text, "prefill")[:3] == ["prefill", "3", "8"]
    assert row(text, "ingress")[:2] == ["ingress", "2"]


def test_monolithic_deployment_has_no_prefill_pool() -> None:
    config = ZoneserveConfig.model_validate(local_config().model_copy(update={"mode": "monolithic"}).model_dump())
    text = text_of(config)
    assert "monolithic" in text
    assert not [line for line in text.splitlines() if line.strip("│ ").startswith("prefill")]


def test_float32_takes_twice_the_memory() -> None:
    text = text_of(local_config(model={"dtype": "float32"}))
    assert row(text, "decode")[5] == "1440 MiB"


def test_backend_that_this_machine_cannot_run_is_said_with_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row(text_of(local_config()), "backend") == ["backend", "native"]
    text = text_of(local_config(model={"dtype": "float32"}))
    assert row(text, "backend")[1] == "torch, not native: its KV cache is bfloat16, not float32"
    assert row(text, "KV layout")[1] == KVCacheLayout(30, 3, 64, 16, "float32").fingerprint()[:16]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "torch, not native: no g++ on the PATH" in row(text_of(local_config()), "backend")[1]
    assert row(text_of(local_config(engine={"backend": "torch"})), "backend")[1] == "torch"


def test_cores_that_the_machine_lacks_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4})
    text = text_of(local_config(prefill={"cpus": [0]}, decode={"cpus": [1]}))
    assert row(text, "prefill")[3] == "0"
    assert row(text, "decode")[3] == "any: this machine has no 1"
    assert row(text_of(local_config(decode={"cpus": []})), "decode")[3] == "any"


def test_model_that_cannot_be_served_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, cache: Path) -> Path:
        raise CheckpointError(f"{name}: not in the cache")

    monkeypatch.setattr(model_store, "resolve", resolve)
    with pytest.raises(CheckpointError, match="smollm2: not in the cache"):
        describe(local_config(), Path("some.yaml"))


def test_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len: 8193 tokens are more than the 8192 of the checkpoint"):
        describe(local_config(model={"max_model_len": 8193}), Path("some.yaml"))


def test_what_is_described_is_what_the_bundled_file_says() -> None:
    document = local_document()
    assert row(text_of(local_config()), "decode")[4] == str(document["decode"]["num_blocks"])


def test_what_trust_rests_on_is_said_and_what_is_missing_too(tmp_path: Path) -> None:
    text = text_of(local_config())
    assert row(text, "policy")[1].startswith("as shipped, ")
    assert row(text, "tokens") == ["tokens", "none: static keys only"]
    assert row(text, "shared texts")[1].startswith("what the manifests in out/local/manifests list")
    assert row(text, "audit log") == ["audit log", "out/local/audit; where it cannot be written: refuse"]
    jwt = {"jwks_url": "https://id.example/keys", "issuer": "https://id.example", "audience": "zoneserve"}
    less: dict[str, object] = {
        "manifests_dir": None, "manifest_keys_file": None, "audit": None, "jwt": jwt, "policy_file": "/absent.yaml"
    }  # fmt: skip
    text = text_of(local_config(trust=less))
    assert row(text, "policy") == ["policy", "/absent.yaml, not on this machine"]
    assert "keys from https://id.example/keys" in row(text, "tokens")[1]
    assert row(text, "shared texts") == ["shared texts", "nothing: there are no manifests"]
    assert row(text, "audit log") == ["audit log", "none: nothing is recorded"]


def test_a_policy_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("version: 1\nrules: [{subject: '*', zone: public, allow: [fly]}]\n")
    with pytest.raises(ConfigError, match=r"policy\.yaml: rules\.0\.allow"):
        describe(local_config(trust={"policy_file": str(tmp_path / "policy.yaml")}), Path("some.yaml"))
