"""The ConfigMap that is mounted and the Serve config beside it describe the same deployment."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check import BASE_MANIFESTS
from cluster.roles import Role
from deployments.config import ZoneserveConfig, parse_config
from deployments.settings import SERVE_TRANSPORT


@pytest.fixture(scope="module")
def config() -> ZoneserveConfig:
    config_map = yaml.safe_load((BASE_MANIFESTS / "config.yaml").read_text(encoding="utf-8"))
    return parse_config(yaml.safe_load(config_map["data"]["config.yaml"]))


@pytest.fixture(scope="module")
def serve_config() -> Any:
    service = yaml.safe_load((BASE_MANIFESTS / "rayservice.yaml").read_text(encoding="utf-8"))
    return yaml.safe_load(service["spec"]["serveConfigV2"])


@pytest.mark.parametrize("role", Role)
def test_pool_is_the_same_in_both_files(role: Role, config: ZoneserveConfig, serve_config: Any) -> None:
    (deployment,) = [d for d in serve_config["applications"][0]["deployments"] if d["name"] == role]
    pool = getattr(config, role)
    assert (pool.replicas, pool.max_ongoing_requests) == (
        deployment["num_replicas"],
        deployment["max_ongoing_requests"],
    )
    assert pool.num_cpus == deployment["ray_actor_options"]["num_cpus"]
    assert pool.labels == deployment["ray_actor_options"]["label_selector"] == role.label_selector


def test_http_address_is_the_same_in_both_files(config: ZoneserveConfig, serve_config: Any) -> None:
    http = serve_config["http_options"]
    assert (config.ingress.host, config.ingress.port) == (http["host"], http["port"])


def test_every_container_sets_serves_transport() -> None:
    service = yaml.safe_load((BASE_MANIFESTS / "rayservice.yaml").read_text(encoding="utf-8"))
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert SERVE_TRANSPORT.items() <= {v["name"]: v["value"] for v in container["env"]}.items()


def test_serve_waits_longer_than_the_deployment_does(config: ZoneserveConfig, serve_config: Any) -> None:
    assert serve_config["http_options"]["request_timeout_s"] > config.routing.request_timeout_s


def test_key_files_are_under_a_mounted_secret(config: ZoneserveConfig) -> None:
    service = yaml.safe_load((BASE_MANIFESTS / "rayservice.yaml").read_text(encoding="utf-8"))
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        secrets = {volume["name"] for volume in pod["volumes"] if "secret" in volume}
        mounts = [Path(m["mountPath"]) for m in pod["containers"][0]["volumeMounts"] if m["name"] in secrets]
        for file in (config.trust.keys_file, config.trust.master_key_file):
            assert file.parent in mounts
    assert not config.trust.create_missing


def test_audit_logs_and_epochs_are_on_a_volume_that_outlives_the_pods_of_every_pool(config: ZoneserveConfig) -> None:
    assert config.trust.audit is not None
    assert config.trust.state_dir is not None
    assert config.trust.state_dir.parent == config.trust.audit.dir.parent
    service = yaml.safe_load((BASE_MANIFESTS / "rayservice.yaml").read_text(encoding="utf-8"))
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        mounts = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] in claims and not m.get("readOnly")]
        # The folder itself must be made by its writer, who alone may read it: a mount point is the volume's.
        assert [mount["mountPath"] for mount in mounts] == [str(config.trust.audit.dir.parent)]
