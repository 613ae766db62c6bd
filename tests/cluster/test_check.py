"""The shipped manifests pass; each way to break them is found, and found where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check import BASE_MANIFESTS, Finding, check_manifests

Change = Callable[[Any], Any]

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def cluster_of(service: Any) -> Any:
    return service["spec"]["rayClusterConfig"]


def head_of(service: Any) -> Any:
    return cluster_of(service)["headGroupSpec"]


def group_of(service: Any, index: int = 1) -> Any:
    return cluster_of(service)["workerGroupSpecs"][index]


def pod_of(service: Any, index: int = 1) -> Any:
    return group_of(service, index)["template"]["spec"]


def container_of(service: Any, index: int = 1) -> Any:
    return pod_of(service, index)["containers"][0]


def application_of(config: Any) -> Any:
    return config["applications"][0]


def deployment_of(config: Any, index: int = 1) -> Any:
    return application_of(config)["deployments"][index]


def expect(findings: list[Finding], file: str, place: str, sentence: str, inner: str = "") -> None:
    """Some finding names the file and the place and says why."""
    assert any(
        finding.file.name == file and place in finding.path and inner in finding.path and sentence in finding.sentence
        for finding in findings
    ), "\n".join(map(str, findings)) or "no findings"


@pytest.mark.parametrize("overlay", ["base", "alpha"])
def test_shipped_manifests_have_no_findings(overlay: str, crds: Path) -> None:
    assert check_manifests(BASE_MANIFESTS.parent / overlay, crds) == []


@pytest.mark.parametrize("overlay", ["base", "alpha"])
def test_shipped_manifests_have_no_findings_without_crds(overlay: str) -> None:
    assert check_manifests(BASE_MANIFESTS.parent / overlay, None) == []


def test_rewritten_but_unchanged_manifests_have_no_findings(manifests: Any, crds: Path) -> None:
    manifests.change_serve_config(lambda config: None)
    assert check_manifests(manifests.base, crds) == []


def test_ray_version_is_the_tested_one() -> None:
    service = yaml.safe_load((BASE_MANIFESTS / "rayservice.yaml").read_text(encoding="utf-8"))
    assert f"ray=={cluster_of(service)['rayVersion']}" in CONSTRAINTS.read_text(encoding="utf-8").splitlines()


# Against the CRD: (change, place, part of the sentence)
SCHEMA_FAULTS: dict[str, tuple[Change, str, str]] = {
    "unknown key in spec": (
        lambda s: s["spec"].update(replicas=2),
        "spec.replicas",
        "does not know",
    ),
    "unknown key beside spec": (lambda s: s.update(extra=1), "extra", "does not know"),
    "unknown metadata key": (lambda s: s["metadata"].update(label={"a": "b"}), "metadata.label", "does not know"),
    "status in a manifest": (lambda s: s.update(status={}), "status", "does not know"),
    "unknown key in the cluster": (
        lambda s: cluster_of(s).update(rayversion="2.60.0"),
        "spec.rayClusterConfig.rayversion",
        "does not know",
    ),
    "unknown key in a group": (
        lambda s: group_of(s).update(label={}),
        "workerGroupSpecs[1].label",
        "does not know",
    ),
    "unknown key in a pod": (
        lambda s: pod_of(s).update(tolerationz=[]),
        "template.spec.tolerationz",
        "does not know",
    ),
    "unknown key in a container": (
        lambda s: container_of(s).update(resource={}),
        "containers[0].resource",
        "does not know",
    ),
    "unknown key in a probe": (
        lambda s: container_of(s)["readinessProbe"]["httpGet"].update(uri="/"),
        "readinessProbe.httpGet.uri",
        "does not know",
    ),
    "number for a string": (
        lambda s: head_of(s)["rayStartParams"].update({"num-cpus": 0}),
        "headGroupSpec.rayStartParams.num-cpus",
        "not of type 'string'",
    ),
    "string for a number": (lambda s: group_of(s).update(replicas="2"), "[1].replicas", "not of type 'integer'"),
    "boolean for a label": (
        lambda s: group_of(s)["labels"].update(spot=True),
        "[1].labels.spot",
        "not of type 'string'",
    ),
    "not a quantity": (
        lambda s: container_of(s)["resources"]["limits"].update(memory="much"),
        "resources.limits.memory",
        "does not match",
    ),
    "not in the enumeration": (
        lambda s: cluster_of(s).update(upgradeStrategy={"type": "RollingUpdate"}),
        "spec.rayClusterConfig.upgradeStrategy.type",
        "is not one of",
    ),
    "required key missing": (
        lambda s: group_of(s).pop("groupName"),
        "workerGroupSpecs[1]",
        "'groupName' is missing",
    ),
    "no cluster": (lambda s: s["spec"].pop("rayClusterConfig"), "spec", "'rayClusterConfig' is missing"),
    "list for an object": (lambda s: s.update(spec=[]), "spec", "not of type 'object'"),
    "null for an object": (lambda s: head_of(s).update(template=None), "template", "not of type 'object'"),
    "a version that is not served": (
        lambda s: s.update(apiVersion="ray.io/v2"),
        "RayService/zoneserve",
        "a kind that this check does not know",
    ),
}


@pytest.mark.parametrize(("change", "place", "sentence"), SCHEMA_FAULTS.values(), ids=SCHEMA_FAULTS)
def test_fault_against_the_crd_is_found(change: Change, place: str, sentence: str, manifests: Any, crds: Path) -> None:
    manifests.change_service(change)
    expect(check_manifests(manifests.base, crds), "rayservice.yaml", place, sentence)


SERVE_FAULTS: dict[str, tuple[Change, str, str]] = {
    "unknown key at the top": (lambda c: c.update(http_option={}), "http_option", "does not know"),
    "unknown HTTP option": (
        lambda c: c["http_options"].update(request_timeout=3),
        "http_options.request_timeout",
        "does not know",
    ),
    "unknown application key": (
        lambda c: application_of(c).update(prefix="/"),
        "applications[0].prefix",
        "does not know",
    ),
    "unknown deployment key": (
        lambda c: deployment_of(c).update(replicas=2),
        "applications[0].deployments[1].replicas",
        "does not know",
    ),
    "unknown actor option": (
        lambda c: deployment_of(c)["ray_actor_options"].update(num_cpu=2),
        "deployments[1].ray_actor_options.num_cpu",
        "does not know",
    ),
    "unknown autoscaling key": (
        lambda c: deployment_of(c).update(autoscaling_config={"min_replica": 1}),
        "deployments[1].autoscaling_config.min_replica",
        "does not know",
    ),
    "autoscaling that contradicts itself": (
        lambda c: deployment_of(c).update(autoscaling_config={"min_replicas": 5, "max_replicas": 2}),
        "deployments[1].autoscaling_config",
        "max_replicas",
    ),
    "unknown runtime_env key": (
        lambda c: deployment_of(c)["ray_actor_options"].update(runtime_env={"env_var": {}}),
        "ray_actor_options.runtime_env.env_var",
        "does not know",
    ),
    "unknown logging key": (lambda c: c["logging_config"].update(level="INFO"), "logging_config.level", ""),
    "wrong type": (lambda c: c["http_options"].update(port="http"), "http_options.port", "valid integer"),
    "out of range": (
        lambda c: deployment_of(c).update(max_ongoing_requests=0),
        "deployments[1].max_ongoing_requests",
        "greater than 0",
    ),
    "bad selector": (
        lambda c: deployment_of(c)["ray_actor_options"].update(label_selector={"zoneserve.io/role": "in(prefill"}),
        "ray_actor_options.label_selector",
        "Invalid label selector",
    ),
    "no import path": (lambda c: application_of(c).pop("import_path"), "applications[0].import_path", "required"),
    "no applications": (lambda c: c.pop("applications"), "applications", "required"),
}


@pytest.mark.parametrize(("change", "place", "sentence"), SERVE_FAULTS.values(), ids=SERVE_FAULTS)
def test_fault_against_serves_schema_is_found(
    change: Change, place: str, sentence: str, manifests: Any, crds_or_none: Path | None
) -> None:
    manifests.change_serve_config(change)
    expect(check_manifests(manifests.base, crds_or_none), "rayservice.yaml", "serveConfigV2 | ", sentence, place)


def test_serve_config_that_is_not_yaml_is_found(manifests: Any, crds_or_none: Path | None) -> None:
    manifests.change_service(lambda s: s["spec"].update(serveConfigV2="applications: [}"))
    expect(check_manifests(manifests.base, crds_or_none), "rayservice.yaml", "serveConfigV2", "not valid YAML")


def test_serve_config_with_a_repeated_key_is_found(manifests: Any, crds_or_none: Path | None) -> None:
    manifests.change_service(lambda s: s["spec"].update(serveConfigV2="applications: []\napplications: []\n"))
    expect(check_manifests(manifests.base, crds_or_none), "rayservice.yaml", "serveConfigV2", "given twice")


def test_missing_serve_config_is_found(manifests: Any, crds_or_none: Path | None) -> None:
    manifests.change_service(lambda s: s["spec"].pop("serveConfigV2"))
    expect(check_manifests(manifests.base, crds_or_none), "rayservice.yaml", "serveConfigV2", "is missing")


# Between parts of the RayService: (change, place, part of the sentence)
SERVICE_FAULTS: dict[str, tuple[Change, str, str]] = {
    "group without the role label": (
        lambda s: group_of(s)["labels"].pop("zoneserve.io/role"),
        "deployments[1].ray_actor_options.label_selector",
        "no worker group carries these labels",
    ),
    "group with no label at all": (lambda s: group_of(s).pop("labels"), "[1].labels", "has no label"),
    "group that nobody uses": (
        lambda s: cluster_of(s)["workerGroupSpecs"].append(
            group_of(s, 2) | {"groupName": "spare", "labels": {"zoneserve.io/role": "spare"}}
        ),
        "workerGroupSpecs[3].labels",
        "no deployment is placed on the worker group spare",
    ),
    "two groups of one name": (lambda s: group_of(s).update(groupName="decode"), "groupName", "declared twice"),
    "minimum above maximum": (lambda s: group_of(s).update(minReplicas=3), "workerGroupSpecs[1]", "minReplicas 3"),
    "more wanted than allowed": (lambda s: group_of(s).update(replicas=9), "workerGroupSpecs[1]", "replicas 9"),
    "labels among the start parameters": (
        lambda s: group_of(s)["rayStartParams"].update(labels="a=b"),
        "rayStartParams.labels",
        "labels field",
    ),
    "unknown upgrade strategy": (
        lambda s: s["spec"]["upgradeStrategy"].update(type="RollingUpdate"),
        "spec.upgradeStrategy.type",
        "is RollingUpdate",
    ),
    "replicas on the head": (lambda s: head_of(s)["rayStartParams"].pop("num-cpus"), "headGroupSpec", "num-cpus"),
    "fewer nodes than replicas": (
        lambda s: group_of(s).update(replicas=1, minReplicas=1, maxReplicas=1),
        "deployments[1].num_replicas",
        "do not fit",
    ),
    "node smaller than a replica": (
        lambda s: container_of(s)["resources"]["limits"].update(cpu="4"),
        "deployments[1].ray_actor_options",
        "needs more than a node",
    ),
    "latest image": (lambda s: container_of(s).update(image="zoneserve:latest"), "image", "no fixed tag"),
    "untagged image on a registry with a port": (
        lambda s: container_of(s).update(image="registry:5000/zoneserve"),
        "image",
        "no fixed tag",
    ),
    "no readiness probe": (lambda s: container_of(s).pop("readinessProbe"), "containers[0]", "no readinessProbe"),
    "no liveness probe": (
        lambda s: head_of(s)["template"]["spec"]["containers"][0].pop("livenessProbe"),
        "headGroupSpec",
        "no livenessProbe",
    ),
    "no memory limit": (
        lambda s: container_of(s)["resources"]["limits"].pop("memory"),
        "resources.limits",
        "sets no memory",
    ),
    "no resources": (lambda s: container_of(s).pop("resources"), "resources.requests", "sets no cpu"),
    "root": (lambda s: pod_of(s)["securityContext"].pop("runAsNonRoot"), "securityContext", "runAsNonRoot"),
    "host network": (lambda s: pod_of(s).update(hostNetwork=True), "hostNetwork", "must not be set"),
    "privilege escalation": (
        lambda s: container_of(s)["securityContext"].pop("allowPrivilegeEscalation"),
        "securityContext",
        "privilege escalation",
    ),
    "capabilities": (lambda s: container_of(s)["securityContext"].pop("capabilities"), "capabilities", "drop ALL"),
    "mounted API token": (
        lambda s: pod_of(s).update(automountServiceAccountToken=True),
        "automountServiceAccountToken",
        "must be false",
    ),
    "unknown service account": (
        lambda s: pod_of(s).update(serviceAccountName="default"),
        "serviceAccountName",
        "no ServiceAccount",
    ),
    "mount without a volume": (lambda s: pod_of(s)["volumes"].pop(0), "volumeMounts[0]", "names no volume"),
    "mount inside a mount": (
        lambda s: container_of(s)["volumeMounts"][1].update(mountPath="/etc/zoneserve/keys"),
        "volumeMounts[1]",
        "inside another mount",
    ),
    "unknown ConfigMap": (
        lambda s: pod_of(s)["volumes"][0]["configMap"].update(name="other"),
        "volumes[0]",
        "names no ConfigMap",
    ),
    "config mounted elsewhere": (
        lambda s: container_of(s)["volumeMounts"][0].update(mountPath="/etc/other"),
        "applications.args.config_path",
        "the group prefill mounts no ConfigMap that holds /etc/zoneserve/config.yaml",
    ),
    "HTTP port not declared": (
        lambda s: container_of(s).update(ports=[{"name": "serve", "containerPort": 8001}]),
        "workerGroupSpecs[1].template.spec.containers",
        "HTTP port 8000",
    ),
    "pod outside every policy": (
        lambda s: group_of(s)["template"]["metadata"]["labels"].update({"app.kubernetes.io/name": "other"}),
        "workerGroupSpecs[1].template.metadata.labels",
        "no NetworkPolicy restricts the ingress of prefill",
    ),
    "Serve set otherwise on one pool": (
        lambda s: container_of(s)["env"][0].update(value="0"),
        "workerGroupSpecs[1].template.spec.containers[0].env",
        "prefill and the head do not have the same RAY_SERVE_USE_GRPC_BY_DEFAULT",
    ),
    "Serve not set on one pool": (
        lambda s: container_of(s).pop("env"),
        "workerGroupSpecs[1].template.spec.containers[0].env",
        "prefill and the head do not have the same RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP",
    ),
    "Serve not set on the head": (
        lambda s: head_of(s)["template"]["spec"]["containers"][0].pop("env"),
        "workerGroupSpecs[0].template.spec.containers[0].env",
        "ingress and the head do not have the same RAY_SERVE_USE_GRPC_BY_DEFAULT",
    ),
    "secret in the environment": (
        lambda s: container_of(s)["env"].append({"name": "ZONE_MASTER_KEY", "value": "c0ffee"}),
        "containers[0].env[4]",
        "carries a secret in plain text",
    ),
}


@pytest.mark.parametrize(("change", "place", "sentence"), SERVICE_FAULTS.values(), ids=SERVICE_FAULTS)
def test_parts_of_the_service_that_do_not_fit_are_found(
    change: Change, place: str, sentence: str, manifests: Any, crds_or_none: Path | None
) -> None:
    manifests.change_service(change)
    expect(check_manifests(manifests.base, crds_or_none), "rayservice.yaml", place, sentence)


PLACEMENT_FAULTS: dict[str, tuple[Change, str, str]] = {
    "no selector": (
        lambda c: deployment_of(c)["ray_actor_options"].pop("label_selector"),
        "deployments[1].ray_actor_options",
        "has no label_selector",
    ),
    "no actor options": (
        lambda c: deployment_of(c).pop("ray_actor_options"),
        "deployments[1].ray_actor_options",
        "has no label_selector",
    ),
    "selector of another role": (
        lambda c: deployment_of(c)["ray_actor_options"].update(label_selector={"zoneserve.io/role": "decode"}),
        "label_selector",
        "sends the deployment prefill to nodes labelled decode",
    ),
    "selector with a second condition that no group meets": (
        lambda c: deployment_of(c)["ray_actor_options"]["label_selector"].update({"ray.io/accelerator-type": "H100"}),
        "label_selector",
        "no worker group carries these labels",
    ),
    "GPU that no node has": (
        lambda c: deployment_of(c)["ray_actor_options"].update(num_gpus=1),
        "deployments[1].ray_actor_options",
        "needs more than a node",
    ),
    "deployment not set": (lambda c: application_of(c)["deployments"].pop(2), "serveConfigV2", "the deployment decode"),
    "more replicas than places": (lambda c: deployment_of(c).update(num_replicas=3), "num_replicas", "do not fit"),
    "config path outside the ConfigMap": (
        lambda c: application_of(c)["args"].update(config_path="/etc/zoneserve/local.yaml"),
        "args.config_path",
        "mounts no ConfigMap",
    ),
    "route that is no path": (lambda c: application_of(c).update(route_prefix="v1"), "route_prefix", "is 'v1'"),
    "route with a wildcard": (lambda c: application_of(c).update(route_prefix="/{x}"), "route_prefix", "no path"),
    "another HTTP port": (lambda c: c["http_options"].update(port=9000), "containers", "HTTP port 9000"),
}


@pytest.mark.parametrize(("change", "place", "sentence"), PLACEMENT_FAULTS.values(), ids=PLACEMENT_FAULTS)
def test_deployment_that_cannot_be_placed_is_found(
    change: Change, place: str, sentence: str, manifests: Any, crds_or_none: Path | None
) -> None:
    manifests.change_serve_config(change)
    expect(check_manifests(manifests.base, crds_or_none), "rayservice.yaml", place, sentence)


OBJECT_FAULTS: dict[str, tuple[str, int, Change, str, str]] = {
    "token mounted by the account": (
        "serviceaccount.yaml",
        0,
        lambda d: d.update(automountServiceAccountToken=True),
        "automountServiceAccountToken",
        "must be false",
    ),
    "unknown key in a policy": (
        "networkpolicy.yaml",
        0,
        lambda d: d["spec"].update(ingres=[]),
        "spec.ingres",
        "does not know",
    ),
    "policy open to everybody": (
        "networkpolicy.yaml",
        1,
        lambda d: d["spec"]["ingress"][0].pop("from"),
        "spec.ingress[0]",
        "opens to everybody",
    ),
    "policy open to every namespace": (
        "networkpolicy.yaml",
        1,
        lambda d: d["spec"]["ingress"][0].update({"from": [{"namespaceSelector": {}}]}),
        "spec.ingress[0]",
        "opens to everybody",
    ),
    "policy open to every address": (
        "networkpolicy.yaml",
        0,
        lambda d: d["spec"]["egress"].append({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
        "spec.egress[2]",
        "opens to everybody",
    ),
    "policy for no pod": (
        "networkpolicy.yaml",
        2,
        lambda d: d["spec"]["podSelector"]["matchLabels"].update({"zoneserve.io/role": "boss"}),
        "spec.podSelector",
        "selects no pod",
    ),
    "policy for a port nobody has": (
        "networkpolicy.yaml",
        1,
        lambda d: d["spec"]["ingress"][0].update(ports=[{"port": 8443}]),
        "spec.ingress[0].ports[0]",
        "8443",
    ),
    "egress left open": (
        "networkpolicy.yaml",
        0,
        lambda d: d["spec"].update(policyTypes=["Ingress"]),
        "",
        "restricts the egress of head",
    ),
    "budget for no pod": (
        "disruption.yaml",
        2,
        lambda d: d["spec"]["selector"]["matchLabels"].update({"zoneserve.io/role": "decoder"}),
        "spec.selector",
        "selects no pod",
    ),
    "two objects of one name": (
        "disruption.yaml",
        2,
        lambda d: d["metadata"].update(name="zoneserve-prefill"),
        "metadata.name",
        "stands twice",
    ),
    "secret in the configuration": (
        "config.yaml",
        0,
        lambda d: d["data"].update({"config.yaml": d["data"]["config.yaml"] + "bearer_token: zs-0123456789\n"}),
        "data[config.yaml]",
        "bearer_token",
    ),
    "private key in the configuration": (
        "config.yaml",
        0,
        lambda d: d["data"].update({"tls.pem": "-----BEGIN EC PRIVATE KEY-----\n"}),
        "data[tls.pem]",
        "private key",
    ),
    "other namespace": (
        "namespace.yaml",
        0,
        lambda d: d["metadata"].update(name="elsewhere"),
        "metadata.namespace",
        "no Namespace",
    ),
    "a Secret": (
        "serviceaccount.yaml",
        0,
        lambda d: d.update(kind="Secret"),
        "Secret/zoneserve",
        "a kind that this check does not know",
    ),
    "label that is no label": (
        "serviceaccount.yaml",
        0,
        lambda d: d["metadata"]["labels"].update(owner="a team"),
        "metadata.labels.owner",
        "does not match",
    ),
}


@pytest.mark.parametrize("name", OBJECT_FAULTS)
def test_object_that_does_not_fit_is_found(name: str, manifests: Any, crds_or_none: Path | None) -> None:
    file, index, change, place, sentence = OBJECT_FAULTS[name]
    manifests.change(file, change, index)
    # A pod that lost its policy, or an object whose namespace is gone, is found where it stands itself.
    expected_file = {"egress left open": "rayservice.yaml", "other namespace": "config.yaml"}.get(name, file)
    expect(check_manifests(manifests.base, crds_or_none), expected_file, place, sentence)


def test_wrong_shape_without_crds_is_a_finding_not_a_crash(manifests: Any) -> None:
    manifests.change_service(lambda s: cluster_of(s).update(workerGroupSpecs="none"))
    expect(check_manifests(manifests.base, None), "base", "", "not shaped as its kind demands")


def test_missing_crd_is_found(manifests: Any, tmp_path: Path) -> None:
    (tmp_path / "crds").mkdir()
    expect(check_manifests(manifests.base, tmp_path / "crds"), "rayservice.yaml", "RayService", "no CRD in")


def test_crd_that_is_not_one_is_found(manifests: Any, tmp_path: Path) -> None:
    crd = "kind: RayService\ngroup: ray.io\nspec: {}\n"
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds" / "broken.yaml").write_text(crd, encoding="utf-8")
    expect(check_manifests(manifests.base, tmp_path / "crds"), "rayservice.yaml", "RayService", "not a readable CRD")


def test_alpha_field_that_kuberay_does_not_have_is_found(manifests: Any, crds: Path) -> None:
    patch = manifests.root / "alpha" / "rayservice.patch.yaml"
    patch.write_text(patch.read_text(encoding="utf-8").replace("backend: rocksdb", "backend: etcd"), encoding="utf-8")
    expect(
        check_manifests(manifests.root / "alpha", crds), "rayservice.yaml", "gcsFaultToleranceOptions.backend", "etcd"
    )
