"""The application as KubeRay builds it, and the configuration its manifests mount."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deployments.config import BUNDLED, ConfigError, parse_config
from engine.errors import CheckpointError

MANIFESTS = Path(__file__).parents[2] / "cluster" / "manifests" / "base"


def test_the_mounted_configuration_is_valid() -> None:
    documents = list(yaml.safe_load_all((MANIFESTS / "config.yaml").read_text()))
    (text,) = (
        value
        for document in documents
        if document["kind"] == "ConfigMap"
        for name, value in document["data"].items()
        if name == "config.yaml"
    )
    config = parse_config(yaml.safe_load(text))
    assert config.mode == "disaggregated"
    assert config.prefill.labels == {"zoneserve.io/role": "prefill"}
    assert config.decode.labels == {"zoneserve.io/role": "decode"}
    assert not config.trust.create_missing


@pytest.mark.model
def test_the_builder_makes_the_graph_from_a_config_path(smollm2_path: Path) -> None:
    from ray.serve import Application

    from deployments.app import BuildArgs, build

    assert isinstance(build(BuildArgs(config_path=str(BUNDLED / "local.yaml"))), Application)


@pytest.mark.parametrize(
    ("old", "new", "kind", "fault"),
    [
        ("name: smollm2", "name: ./broken.gguf", CheckpointError, r"broken\.gguf: not a GGUF file"),
        pytest.param(
            "max_model_len: 8192", "max_model_len: 9000", ConfigError, "9000 tokens are more than the 8192",
            marks=pytest.mark.model,
        ),
    ],
)  # fmt: skip
def test_what_no_replica_could_serve_is_refused_before_any_starts(
    old: str, new: str, kind: type[Exception], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deployments.app import BuildArgs, build

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gguf").write_text("no model")
    (tmp_path / "config.yaml").write_text((BUNDLED / "local.yaml").read_text().replace(old, new))
    with pytest.raises(kind, match=fault):
        build(BuildArgs(config_path="config.yaml"))


def test_the_builder_refuses_unknown_arguments() -> None:
    from pydantic import ValidationError

    from deployments.app import BuildArgs

    with pytest.raises(ValidationError):
        BuildArgs.model_validate({"config_path": "x", "confg": 1})
