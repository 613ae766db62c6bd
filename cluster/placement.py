"""Turns labels and resources into what Ray needs to place a replica.

The one file of this package, beside `serve_schema`, that imports ray.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.roles import selector_matches


class PlacementError(Exception):
    """No node of the Ray cluster can ever hold a replica of some deployment. The message names it."""


@dataclass(frozen=True, slots=True)
class Node:
    """What placement needs to know of one live Ray node."""

    labels: Mapping[str, str]
    resources: Mapping[str, float]


def ray_actor_options(
    *,
    num_cpus: float,
    num_gpus: float = 0.0,
    memory_bytes: int = 0,
    labels: Mapping[str, str] | None = None,
    env_vars: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """`ray_actor_options` of a Serve deployment.

    Args:
        num_cpus: Logical CPUs of one replica; may be 0.
        num_gpus: Logical GPUs of one replica.
        memory_bytes: Heap memory reserved for one replica; 0 reserves none.
        labels: Conditions on the node's labels, for example `Role.PREFILL.label_selector`. None or empty
            lets the replica run anywhere, as on one machine where a single node carries all roles.
        env_vars: Environment of the replica's process, set before it imports anything.

    Raises:
        ValueError: A resource is negative, or a label or its condition is not in Ray's syntax.
    """
    from ray._private.label_utils import validate_label_selector

    if num_cpus < 0 or num_gpus < 0 or memory_bytes < 0:
        raise ValueError("the resources of a replica must not be negative")
    if fault := validate_label_selector(dict(labels or {})):
        raise ValueError(fault)
    options: dict[str, object] = {"num_cpus": num_cpus}
    if num_gpus:
        options["num_gpus"] = num_gpus
    if memory_bytes:
        options["memory"] = memory_bytes
    if labels:
        options["label_selector"] = dict(labels)
    if env_vars:
        options["runtime_env"] = {"env_vars": dict(env_vars)}
    return options


def live_nodes() -> tuple[Node, ...]:
    """The live nodes of the Ray cluster this process is connected to."""
    import ray

    return tuple(
        Node(labels=dict(node.get("Labels") or {}), resources=dict(node.get("Resources") or {}))
        for node in ray.nodes()
        if node["Alive"]
    )


def check_placeable(
    name: str, *, labels: Mapping[str, str], num_cpus: float, num_gpus: float = 0.0, nodes: Iterable[Node]
) -> None:
    """Refuse a placement that would leave Serve waiting for ever.

    Only for clusters of fixed size: an autoscaler may still bring the missing node.

    Raises:
        PlacementError: No node carries the labels, or none that does is large enough for one replica of `name`.
    """
    labelled = [node for node in nodes if selector_matches(labels, node.labels)]
    if not labelled:
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        raise PlacementError(f"no Ray node carries the label {wanted}, so {name} has nowhere to run")
    if not any(
        node.resources.get("CPU", 0.0) >= num_cpus and node.resources.get("GPU", 0.0) >= num_gpus for node in labelled
    ):
        raise PlacementError(
            f"no node labelled for {name} has {num_cpus:g} CPUs and {num_gpus:g} GPUs, which one replica needs"
        )
