"""What a schema cannot say about our manifests: that the objects fit one another and are safe to run.

Each rule is a pure function from all objects to complaints. The objects have passed their schemas, except
that a RayService has not when no CRD was at hand: rules read optional parts with a default.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.documents import Document
from cluster.object_schema import join_path
from cluster.roles import ROLE_LABEL, Role, selector_matches

Complaint = tuple[Document, str, str]
Rule = Callable[["Manifests"], Iterator[Complaint]]

UPGRADE_STRATEGIES = frozenset({"NewCluster", "NewClusterWithIncrementalUpgrade", "None"})

_ROUTE = re.compile(r"^/$|^(/[^/{}]+)+$")
_SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|api_?key|private_?key|master_?key|bearer|credential)")
_REFERENCE_NAME = re.compile(r"(?i)(file|path|dir|name|ref)s?$")
_SERVE_VARIABLES = "RAY_SERVE_"
_SETTING = re.compile(r"^\s*[\"']?(?P<name>[A-Za-z0-9_.-]+)[\"']?\s*[:=]\s*(?P<value>\S.*)$")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_QUANTITY = re.compile(r"^(?P<number>[0-9]+(\.[0-9]+)?)(?P<suffix>m|k|M|G|T|Ki|Mi|Gi|Ti)?$")
_SCALE = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SCALE |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod template of the head or of one worker group."""

    document: Document
    place: str  # of the group
    group: str
    role_labels: Mapping[str, str]  # Ray node labels
    start_params: Mapping[str, Any]
    template: Mapping[str, Any]
    num_min: int
    num_max: int
    num_wanted: int

    @property
    def spec(self) -> Mapping[str, Any]:
        spec: Mapping[str, Any] = self.template.get("spec", {})
        return spec

    @property
    def pod_labels(self) -> Mapping[str, str]:
        labels: Mapping[str, str] = self.template.get("metadata", {}).get("labels", {})
        return labels

    @property
    def is_head(self) -> bool:
        return self.group == "head"

    def containers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, container) of each container, init containers included."""
        for kind in ("initContainers", "containers"):
            for index, container in enumerate(self.spec.get(kind, [])):
                yield f"{self.place}.template.spec.{kind}[{index}]", container

    def serve_settings(self) -> dict[str, str | None]:
        """What Serve's processes in the Ray container read of their environment; None where it comes from elsewhere."""
        variables = self.spec.get("containers", [{}])[0].get("env", [])
        return {v["name"]: v.get("value") for v in variables if v["name"].startswith(_SERVE_VARIABLES)}

    def container_ports(self) -> dict[int, str]:
        return {
            port["containerPort"]: port.get("name", "")
            for _, container in self.containers()
            for port in container.get("ports", [])
        }

    def capacity(self, resource: str, start_param: str) -> float:
        """How much of a resource Ray finds on a node of this group."""
        if start_param in self.start_params:
            return float(self.start_params[start_param])
        ray_container = self.spec.get("containers", [{}])[0]
        return parse_quantity(str(ray_container.get("resources", {}).get("limits", {}).get(resource, "0")))


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment of the Serve config inside a RayService."""

    document: Document
    place: str
    application: Mapping[str, Any]
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.body["name"])

    @property
    def actor_options(self) -> Mapping[str, Any]:
        options: Mapping[str, Any] = self.body.get("ray_actor_options") or {}
        return options

    def amount(self, option: str, default: float) -> float:
        """How much of a resource one replica takes."""
        value = self.actor_options.get(option)
        return default if value is None else float(value)

    @property
    def label_selector(self) -> Mapping[str, str]:
        selector: Mapping[str, str] = self.actor_options.get("label_selector") or {}
        return selector


@dataclass(frozen=True, slots=True)
class Manifests:
    """All objects, with the parts of the RayServices that the rules look at taken out."""

    documents: tuple[Document, ...]
    serve_configs: Mapping[str, Any]  # by title of the RayService
    pods: tuple[Pod, ...]
    deployments: tuple[Deployment, ...]

    @classmethod
    def of(cls, documents: Iterable[Document], serve_configs: Mapping[str, Any]) -> "Manifests":
        everything = tuple(documents)
        services = [document for document in everything if document.kind == "RayService"]
        return cls(
            everything,
            serve_configs,
            tuple(pod for service in services for pod in _pods(service)),
            tuple(d for service in services for d in _deployments(service, serve_configs.get(service.title))),
        )

    def of_kind(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document.kind == kind]

    def workers(self) -> list[Pod]:
        return [pod for pod in self.pods if not pod.is_head]


def parse_quantity(text: str) -> float:
    """A Kubernetes quantity in base units (cores, bytes); 0 when it is none of the usual forms."""
    match = _QUANTITY.match(text)
    return float(match["number"]) * _SCALE[match["suffix"] or ""] if match else 0.0


def _pods(service: Document) -> Iterator[Pod]:
    place = "spec.rayClusterConfig"
    cluster = service.body["spec"].get("rayClusterConfig", {})
    head = cluster.get("headGroupSpec", {})
    yield _pod(service, f"{place}.headGroupSpec", "head", head)
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        yield _pod(service, f"{place}.workerGroupSpecs[{index}]", str(group.get("groupName", index)), group)


def _pod(service: Document, place: str, name: str, group: Mapping[str, Any]) -> Pod:
    num_min = group.get("minReplicas", 1 if name == "head" else 0)
    return Pod(
        service,
        place,
        name,
        role_labels=group.get("labels", {}),
        start_params=group.get("rayStartParams", {}),
        template=group.get("template", {}),
        num_min=num_min,
        num_max=group.get("maxReplicas", 1 if name == "head" else 2**31 - 1),
        num_wanted=group.get("replicas", num_min),
    )


def _deployments(service: Document, config: Any) -> Iterator[Deployment]:
    for number, application in enumerate(config["applications"] if config else []):
        for index, body in enumerate(application.get("deployments", [])):
            inner = join_path(["applications", number, "deployments", index])
            yield Deployment(service, f"spec.serveConfigV2 | {inner}", application, body)


# --- roles and placement ---------------------------------------------------------------------


def every_role_is_deployed_once(manifests: Manifests) -> Iterator[Complaint]:
    for service in manifests.of_kind("RayService"):
        names = [d.name for d in manifests.deployments if d.document is service]
        for role in Role:
            if names.count(role) != 1:
                yield (
                    service,
                    "spec.serveConfigV2",
                    f"must set the deployment {role} once, not {names.count(role)} times",
                )


def every_deployment_finds_a_group(manifests: Manifests) -> Iterator[Complaint]:
    for deployment in manifests.deployments:
        place = f"{deployment.place}.ray_actor_options"
        selector = deployment.label_selector
        if ROLE_LABEL not in selector:
            yield deployment.document, place, f"the deployment {deployment.name} has no label_selector for {ROLE_LABEL}"
            continue
        if selector[ROLE_LABEL] != deployment.name:
            yield (
                deployment.document,
                f"{place}.label_selector",
                f"sends the deployment {deployment.name} to nodes labelled {selector[ROLE_LABEL]}",
            )
        matching = _matching_groups(deployment, manifests)
        if not matching:
            yield deployment.document, f"{place}.label_selector", "no worker group carries these labels"
        elif not any(_fits(deployment, pod) for pod in matching):
            groups = ", ".join(pod.group for pod in matching)
            yield deployment.document, place, f"one replica needs more than a node of the group {groups} has"


def _matching_groups(deployment: Deployment, manifests: Manifests) -> list[Pod]:
    return [
        pod
        for pod in manifests.workers()
        if pod.document is deployment.document and selector_matches(deployment.label_selector, pod.role_labels)
    ]


def _fits(deployment: Deployment, pod: Pod) -> bool:
    return all(
        deployment.amount(option, default) <= pod.capacity(resource, start_param)
        for option, default, resource, start_param in (
            ("num_cpus", 1, "cpu", "num-cpus"),
            ("num_gpus", 0, "nvidia.com/gpu", "num-gpus"),
            ("memory", 0, "memory", "memory"),
        )
    )


def every_group_is_used(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.workers():
        if ROLE_LABEL not in pod.role_labels:
            yield pod.document, f"{pod.place}.labels", f"the worker group {pod.group} has no label {ROLE_LABEL}"
        elif not any(pod in _matching_groups(deployment, manifests) for deployment in manifests.deployments):
            yield pod.document, f"{pod.place}.labels", f"no deployment is placed on the worker group {pod.group}"


def groups_are_sized_soundly(manifests: Manifests) -> Iterator[Complaint]:
    seen: set[tuple[str, str]] = set()
    for pod in manifests.workers():
        if (pod.document.title, pod.group) in seen:
            yield pod.document, f"{pod.place}.groupName", f"the worker group {pod.group} is declared twice"
        seen.add((pod.document.title, pod.group))
        if not 0 <= pod.num_min <= pod.num_wanted <= pod.num_max:
            sizes = f"minReplicas {pod.num_min}, replicas {pod.num_wanted}, maxReplicas {pod.num_max}"
            yield pod.document, pod.place, f"must have minReplicas <= replicas <= maxReplicas, not {sizes}"
        if "labels" in pod.start_params:
            yield pod.document, f"{pod.place}.rayStartParams.labels", "belongs in the group's own labels field"


def fixed_replicas_fit_their_group(manifests: Manifests) -> Iterator[Complaint]:
    """All replicas of a deployment of fixed size must find a place when its groups are at their largest."""
    for deployment in manifests.deployments:
        num_replicas = deployment.body.get("num_replicas")
        cpus = deployment.amount("num_cpus", 1)
        if not isinstance(num_replicas, int) or not cpus:
            continue
        places = sum(
            pod.num_max * int(pod.capacity("cpu", "num-cpus") // cpus)
            for pod in _matching_groups(deployment, manifests)
        )
        if 0 < places < num_replicas:
            sentence = (
                f"{num_replicas} replicas of {deployment.name} do not fit its groups, which have room for {places}"
            )
            yield deployment.document, f"{deployment.place}.num_replicas", sentence


def the_head_runs_no_replica(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.pods:
        if pod.is_head and pod.start_params.get("num-cpus") != "0":
            yield (
                pod.document,
                f"{pod.place}.rayStartParams",
                'must set num-cpus to "0": replicas must not share the head',
            )


def pods_share_serves_settings(manifests: Manifests) -> Iterator[Complaint]:
    """Serve's controller runs on the head and its proxies on the workers: they must agree on how to reach a replica."""
    heads = {pod.document.title: pod.serve_settings() for pod in manifests.pods if pod.is_head}
    for pod in manifests.workers():
        of_head, of_pod = heads[pod.document.title], pod.serve_settings()
        for name in sorted(of_head | of_pod):
            if name not in of_head or name not in of_pod or of_head[name] != of_pod[name]:
                place = f"{pod.place}.template.spec.containers[0].env"
                yield pod.document, place, f"{pod.group} and the head do not have the same {name}"


def the_service_speaks_kuberays_and_serves_words(manifests: Manifests) -> Iterator[Complaint]:
    """Two values that both schemas leave open, and that would be refused or ignored only once applied."""
    for service in manifests.of_kind("RayService"):
        upgrade = service.body["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
        if upgrade not in UPGRADE_STRATEGIES:
            known = ", ".join(sorted(UPGRADE_STRATEGIES))
            yield service, "spec.upgradeStrategy.type", f"is {upgrade}, which is none of {known}"
        config = manifests.serve_configs.get(service.title) or {}
        for index, application in enumerate(config.get("applications", [])):
            route = application.get("route_prefix", "/")
            if route is not None and not _ROUTE.match(route):
                place = f"spec.serveConfigV2 | applications[{index}].route_prefix"
                yield service, place, f"is {route!r}, which is no path that Serve can route"


# --- containers ------------------------------------------------------------------------------


def images_are_pinned(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.pods:
        for place, container in pod.containers():
            image = container.get("image", "")
            _, _, tag = image.rpartition("/")[2].partition(":")
            if "@sha256:" not in image and tag in {"", "latest"}:
                yield pod.document, f"{place}.image", f"{image or 'no image'} has no fixed tag or digest"


def containers_have_limits_and_probes(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.pods:
        for place, container in pod.containers():
            resources = container.get("resources", {})
            for bound in ("requests", "limits"):
                for resource in ("cpu", "memory"):
                    if resource not in resources.get(bound, {}):
                        yield pod.document, f"{place}.resources.{bound}", f"sets no {resource}"
            if ".initContainers" in place:
                continue
            for probe in ("readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield pod.document, place, f"has no {probe}"


def pods_run_with_least_privilege(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.pods:
        spec_place = f"{pod.place}.template.spec"
        if pod.spec.get("securityContext", {}).get("runAsNonRoot") is not True:
            yield pod.document, f"{spec_place}.securityContext", "must set runAsNonRoot"
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(field):
                yield pod.document, f"{spec_place}.{field}", "must not be set"
        for place, container in pod.containers():
            context = container.get("securityContext", {})
            if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
                yield pod.document, f"{place}.securityContext", "must forbid privilege escalation"
            if "ALL" not in context.get("capabilities", {}).get("drop", []):
                yield pod.document, f"{place}.securityContext.capabilities", "must drop ALL"


def no_token_is_mounted(manifests: Manifests) -> Iterator[Complaint]:
    accounts = {account.name: account for account in manifests.of_kind("ServiceAccount")}
    for account in accounts.values():
        if account.body.get("automountServiceAccountToken") is not False:
            yield account, "automountServiceAccountToken", "must be false: no pod of ours calls the Kubernetes API"
    for pod in manifests.pods:
        place = f"{pod.place}.template.spec"
        if pod.spec.get("serviceAccountName") not in accounts:
            yield pod.document, f"{place}.serviceAccountName", "names no ServiceAccount of these manifests"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.document, f"{place}.automountServiceAccountToken", "must be false"


# --- references ------------------------------------------------------------------------------


def mounts_name_volumes(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.pods:
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for place, container in pod.containers():
            for index, mount in enumerate(container.get("volumeMounts", [])):
                if mount["name"] not in volumes:
                    yield pod.document, f"{place}.volumeMounts[{index}]", f"names no volume: {mount['name']}"


def mounts_do_not_nest(manifests: Manifests) -> Iterator[Complaint]:
    """A mount point inside a read-only volume cannot be made, so such a pod never starts."""
    for pod in manifests.pods:
        for place, container in pod.containers():
            mounts = container.get("volumeMounts", [])
            paths = [f"{mount['mountPath'].rstrip('/')}/" for mount in mounts]
            for index, path in enumerate(paths):
                if any(path.startswith(other) for number, other in enumerate(paths) if number != index):
                    yield pod.document, f"{place}.volumeMounts[{index}]", f"lies inside another mount: {path}"


def config_maps_exist(manifests: Manifests) -> Iterator[Complaint]:
    known = {config_map.name for config_map in manifests.of_kind("ConfigMap")}
    for pod in manifests.pods:
        for index, volume in enumerate(pod.spec.get("volumes", [])):
            name = volume.get("configMap", {}).get("name")
            if name is not None and name not in known:
                place = f"{pod.place}.template.spec.volumes[{index}]"
                yield pod.document, place, f"names no ConfigMap of these manifests: {name}"


def the_config_file_is_mounted(manifests: Manifests) -> Iterator[Complaint]:
    """The application is built on any node of the cluster, so each one must see the file it is built from."""
    seen: set[tuple[str, str]] = set()
    for deployment in manifests.deployments:
        config_path = deployment.application.get("args", {}).get("config_path")
        for pod in manifests.pods:
            key = (str(config_path), f"{pod.document.title}/{pod.group}")
            if key in seen or pod.document is not deployment.document:
                continue
            seen.add(key)
            if config_path not in _config_map_files(pod, manifests):
                sentence = f"the group {pod.group} mounts no ConfigMap that holds {config_path}"
                yield pod.document, "spec.serveConfigV2 | applications.args.config_path", sentence


def _config_map_files(pod: Pod, manifests: Manifests) -> set[str]:
    """Absolute paths of all files that the pod's containers see from ConfigMaps."""
    keys = {config_map.name: list(config_map.body["data"]) for config_map in manifests.of_kind("ConfigMap")}
    volumes = {
        volume["name"]: keys.get(volume["configMap"].get("name"), [])
        for volume in pod.spec.get("volumes", [])
        if "configMap" in volume
    }
    return {
        f"{mount['mountPath'].rstrip('/')}/{key}"
        for _, container in pod.containers()
        for mount in container.get("volumeMounts", [])
        for key in volumes.get(mount["name"], [])
    }


def objects_are_named_once(manifests: Manifests) -> Iterator[Complaint]:
    seen: set[tuple[str, str]] = set()
    for document in manifests.documents:
        if (document.kind, document.name) in seen:
            yield document, "metadata.name", "an object of this kind and name stands twice in these manifests"
        seen.add((document.kind, document.name))


def objects_share_one_namespace(manifests: Manifests) -> Iterator[Complaint]:
    namespaces = {namespace.name for namespace in manifests.of_kind("Namespace")}
    for document in manifests.documents:
        namespace = document.body["metadata"].get("namespace")
        if document.kind != "Namespace" and namespace not in namespaces:
            sentence = f"is {namespace or 'missing'}, which is no Namespace of these manifests"
            yield document, "metadata.namespace", sentence


# --- network ---------------------------------------------------------------------------------


def serve_port_is_open(manifests: Manifests) -> Iterator[Complaint]:
    for service in manifests.of_kind("RayService"):
        config = manifests.serve_configs.get(service.title) or {}
        port = config.get("http_options", {}).get("port", 8000)
        for pod in manifests.pods:
            if pod.document is service and port not in pod.container_ports():
                sentence = f"the containers of {pod.group} do not declare the HTTP port {port} of the Serve config"
                yield service, f"{pod.place}.template.spec.containers", sentence


def pods_are_isolated(manifests: Manifests) -> Iterator[Complaint]:
    """Each pod must be under a policy that closes both directions."""
    policies = manifests.of_kind("NetworkPolicy")
    for pod in manifests.pods:
        for direction in ("Ingress", "Egress"):
            if not any(
                direction in policy.body["spec"]["policyTypes"] and _selects(policy.body["spec"]["podSelector"], pod)
                for policy in policies
            ):
                place = f"{pod.place}.template.metadata.labels"
                yield pod.document, place, f"no NetworkPolicy restricts the {direction.lower()} of {pod.group}"


def policies_select_something(manifests: Manifests) -> Iterator[Complaint]:
    for kind, key in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        for document in manifests.of_kind(kind):
            if not any(_selects(document.body["spec"][key], pod) for pod in manifests.pods):
                yield document, f"spec.{key}", "selects no pod of these manifests"


def policies_open_nothing_to_everybody(manifests: Manifests) -> Iterator[Complaint]:
    for policy in manifests.of_kind("NetworkPolicy"):
        for direction, side in (("ingress", "from"), ("egress", "to")):
            for index, rule in enumerate(policy.body["spec"].get(direction, [])):
                peers = rule.get(side, [])
                place = f"spec.{direction}[{index}]"
                if not peers or any(_is_everybody(peer) for peer in peers):
                    yield policy, place, f"names no peer in `{side}`, so it opens to everybody"


def _is_everybody(peer: Mapping[str, Any]) -> bool:
    """Whether a peer is every pod of every namespace, or every address."""
    if "ipBlock" in peer:
        return str(peer["ipBlock"].get("cidr", "")).endswith("/0")
    return "namespaceSelector" in peer and not peer["namespaceSelector"] and not peer.get("podSelector")


def policy_ports_are_declared(manifests: Manifests) -> Iterator[Complaint]:
    for policy in manifests.of_kind("NetworkPolicy"):
        selected = [pod for pod in manifests.pods if _selects(policy.body["spec"]["podSelector"], pod)]
        for index, rule in enumerate(policy.body["spec"].get("ingress", [])):
            for number, port in enumerate(rule.get("ports", [])):
                for pod in selected:
                    declared = pod.container_ports()
                    if port.get("port") not in {*declared, *declared.values()}:
                        place = f"spec.ingress[{index}].ports[{number}]"
                        yield policy, place, f"opens the port {port.get('port')}, which {pod.group} does not declare"


def _selects(selector: Mapping[str, Any], pod: Pod) -> bool:
    labels = pod.pod_labels
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        _expression_holds(expression, labels) for expression in selector.get("matchExpressions", [])
    )


def _expression_holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None


# --- secrets ---------------------------------------------------------------------------------


def no_secret_in_plain_text(manifests: Manifests) -> Iterator[Complaint]:
    for pod in manifests.pods:
        for place, container in pod.containers():
            for index, variable in enumerate(container.get("env", [])):
                if "value" in variable and _looks_secret(variable["name"], variable["value"]):
                    sentence = f"{variable['name']} carries a secret in plain text; mount it as a file"
                    yield pod.document, f"{place}.env[{index}]", sentence
    for config_map in manifests.of_kind("ConfigMap"):
        for key, text in config_map.body["data"].items():
            for sentence in _secrets_in(text):
                yield config_map, f"data[{key}]", sentence


def _secrets_in(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if _PRIVATE_KEY.search(line):
            yield f"line {number} begins a private key"
        setting = _SETTING.match(line)
        if setting and _looks_secret(setting["name"], setting["value"]):
            yield f"line {number} sets {setting['name']} to a secret in plain text"


def _looks_secret(name: str, value: str) -> bool:
    """A name that sounds like a secret with a value that is not a path, a switch or a number."""
    plain = value.strip().strip("\"'")
    is_harmless = not plain or plain.startswith(("/", "#")) or plain in {"true", "false", "null"}
    is_number = plain.replace(".", "", 1).isdigit()
    return bool(_SECRET_NAME.search(name)) and not (_REFERENCE_NAME.search(name) or is_harmless or is_number)


ALL: tuple[Rule, ...] = (
    objects_are_named_once,
    objects_share_one_namespace,
    every_role_is_deployed_once,
    every_deployment_finds_a_group,
    every_group_is_used,
    groups_are_sized_soundly,
    fixed_replicas_fit_their_group,
    the_head_runs_no_replica,
    pods_share_serves_settings,
    the_service_speaks_kuberays_and_serves_words,
    images_are_pinned,
    containers_have_limits_and_probes,
    pods_run_with_least_privilege,
    no_token_is_mounted,
    mounts_name_volumes,
    mounts_do_not_nest,
    config_maps_exist,
    the_config_file_is_mounted,
    serve_port_is_open,
    pods_are_isolated,
    policies_select_something,
    policies_open_nothing_to_everybody,
    policy_ports_are_declared,
    no_secret_in_plain_text,
)
