"""Roles become labels, labels become placement, and a placement that cannot succeed is refused."""

import pytest

from cluster.placement import Node, PlacementError, check_placeable, ray_actor_options
from cluster.roles import ROLE_LABEL, Role, selector_matches

LABELS = Role.PREFILL.label_selector
NODES = (
    Node(labels=Role.PREFILL.node_labels, resources={"CPU": 4.0}),
    Node(labels=Role.DECODE.node_labels, resources={"CPU": 16.0, "GPU": 1.0}),
)


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ("prefill", "prefill", True),
        ("prefill", "decode", False),
        ("prefill", None, False),
        ("!prefill", "decode", True),
        ("!prefill", "prefill", False),
        ("!prefill", None, True),
        ("in(prefill, decode)", "decode", True),
        ("in(prefill,decode)", "ingress", False),
        ("in(prefill)", None, False),
        ("!in(prefill, decode)", "ingress", True),
        ("!in(prefill, decode)", "decode", False),
    ],
)
def test_label_condition_holds_as_ray_reads_it(condition: str, value: str | None, holds: bool) -> None:
    labels = {} if value is None else {ROLE_LABEL: value}
    assert selector_matches({ROLE_LABEL: condition}, labels) is holds


def test_selector_needs_every_condition() -> None:
    assert selector_matches({}, {})
    assert not selector_matches({"a": "1", "b": "2"}, {"a": "1"})


def test_each_role_selects_its_own_nodes_only() -> None:
    for role in Role:
        assert [other for other in Role if selector_matches(role.label_selector, other.node_labels)] == [role]


def test_actor_options_hold_only_what_was_asked_for() -> None:
    assert ray_actor_options(num_cpus=0.5) == {"num_cpus": 0.5}
    assert ray_actor_options(
        num_cpus=8, num_gpus=1, memory_bytes=2**30, labels=LABELS, env_vars={"OMP_WAIT_POLICY": "passive"}
    ) == {
        "num_cpus": 8,
        "num_gpus": 1,
        "memory": 2**30,
        "label_selector": {ROLE_LABEL: "prefill"},
        "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "passive"}},
    }


@pytest.mark.parametrize("resource", ["num_cpus", "num_gpus", "memory_bytes"])
def test_negative_resource_is_refused(resource: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        ray_actor_options(**{"num_cpus": 1, resource: -1})


@pytest.mark.parametrize("labels", [{ROLE_LABEL: "in(prefill"}, {"-role": "prefill"}])
def test_label_in_no_syntax_of_rays_is_refused(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="Invalid label"):
        ray_actor_options(num_cpus=1, labels=labels)


def test_placement_that_fits_is_accepted() -> None:
    check_placeable("prefill", labels=LABELS, num_cpus=4, nodes=NODES)
    check_placeable("decode", labels=Role.DECODE.label_selector, num_cpus=8, num_gpus=1, nodes=NODES)
    check_placeable("anything", labels={}, num_cpus=16, nodes=NODES)


@pytest.mark.parametrize(
    ("labels", "num_cpus", "num_gpus", "reason"),
    [
        (Role.INGRESS.label_selector, 1, 0, "no Ray node carries the label zoneserve.io/role=ingress"),
        (LABELS, 8, 0, "8 CPUs and 0 GPUs"),
        (LABELS, 1, 1, "1 CPUs and 1 GPUs"),
    ],
)
def test_placement_that_cannot_succeed_is_refused(
    labels: dict[str, str], num_cpus: float, num_gpus: float, reason: str
) -> None:
    with pytest.raises(PlacementError, match=reason):
        check_placeable("pool", labels=labels, num_cpus=num_cpus, num_gpus=num_gpus, nodes=NODES)
