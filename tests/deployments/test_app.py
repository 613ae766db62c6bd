"""The application as KubeRay builds it, and the configuration its manifests mount."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deployments.config import BUNDLED, parse_config

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


def test_the_builder_refuses_unknown_arguments() -> None:
    from pydantic import ValidationError

    from deployments.app import BuildArgs

    with pytest.raises(ValidationError):
        BuildArgs.model_validate({"config_path": "x", "confg": 1})
