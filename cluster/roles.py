"""The three roles a replica can have, and the node label that says where each may run."""

from collections.abc import Mapping
from enum import StrEnum

ROLE_LABEL = "zoneserve.io/role"
"""Key of the Ray node label. KubeRay copies a worker group's `labels` to its nodes."""


class Role(StrEnum):
    """What a replica does with a request; also the name of its Serve deployment."""

    INGRESS = "ingress"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def node_labels(self) -> dict[str, str]:
        """Labels of a node on which replicas of this role may run."""
        return {ROLE_LABEL: self.value}

    @property
    def label_selector(self) -> dict[str, str]:
        """The `label_selector` of `ray_actor_options` that finds such a node."""
        return {ROLE_LABEL: self.value}


def selector_matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` satisfies every condition of a Ray label selector.

    A condition is `value`, `!value`, `in(a, b)` or `!in(a, b)`. As in Ray, a negated
    condition also holds on a node that lacks the key.
    """
    return all(_condition_holds(condition, labels.get(key)) for key, condition in selector.items())


def _condition_holds(condition: str, value: str | None) -> bool:
    negated = condition.startswith("!")
    operand = condition.removeprefix("!")
    if operand.startswith("in(") and operand.endswith(")"):
        accepted = {item.strip() for item in operand[len("in(") : -1].split(",")}
    else:
        accepted = {operand}
    return (value in accepted) is not negated
