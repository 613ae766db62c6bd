"""What is run, on which prompts, and what must come out. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.figures import Spread

DECODE_STEPS = 32


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch_size` sequences of `context` tokens each. `steps`: decode steps that are timed; 0: the prefill is."""

    batch_size: int
    context: int
    steps: int

    @property
    def name(self) -> str:
        return f"decode_b{self.batch_size}_c{self.context}" if self.steps else f"prefill_{self.context}"

    @property
    def label(self) -> str:
        if self.steps:
            return f"decode B={self.batch_size}, context {self.context}"
        return f"prefill {self.context}"


WORKLOADS = (
    *(Workload(size, 512, DECODE_STEPS) for size in (1, 4, 16, 32)),
    *(Workload(size, 2048, DECODE_STEPS) for size in (1, 16)),
    *(Workload(1, length, 0) for length in (512, 2048)),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio of ours to a peer's in one figure of the report, and the bound that it must keep.

    `path`: where the figure's spreads by contender are. `is_ceiling`: less is better, the ratio may be `bound` at most.
    """

    label: str
    path: tuple[str, ...]
    peer: str
    bound: float
    ours: str = "ours"
    is_ceiling: bool = False


def _engine(workload: str, peer: str, bound: float) -> Target:
    label = next(each.label for each in WORKLOADS if each.name == workload)
    return Target(label, ("engine", workload), peer, bound)


_HTTP_THROUGHPUT = ("http", "burst", "output_tokens_per_s")

TARGETS = (
    _engine("decode_b1_c512", "vllm", 4.0),
    _engine("decode_b1_c512", "llama_cpp", 2.5),
    _engine("decode_b16_c512", "vllm", 1.6),
    _engine("decode_b16_c512", "llama_cpp", 3.0),
    _engine("decode_b16_c2048", "vllm", 1.5),
    _engine("prefill_512", "vllm", 1.1),
    _engine("prefill_2048", "vllm", 1.2),
    Target("HTTP, 16 streams at once, one pool, tokens/s", _HTTP_THROUGHPUT, "vllm", 1.5, ours="ours_monolithic"),
    Target("HTTP, 16 streams at once, two pools, tokens/s", _HTTP_THROUGHPUT, "vllm", 1.5),
    Target("peak memory of one process", ("memory", "peak_mib"), "vllm", 0.5, is_ceiling=True),
)


def select(names: Sequence[str]) -> list[Workload]:
    """The workloads of these names, all where none is named.

    Raises:
        ValueError: There is no workload of a name.
    """
    known = {workload.name: workload for workload in WORKLOADS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no workload {', '.join(unknown)}: there are {', '.join(known)}")
    return [workload for workload in WORKLOADS if not names or workload.name in names]


class Prompts:
    """Prompts of plain words, each one token, so that the text and the ids are the same prompt to every contender."""

    def __init__(self, word_ids: Sequence[int], seed: int) -> None:
        """
        Raises:
            ValueError: Too few words for prompts that share no beginning.
        """
        if len(word_ids) < 256:
            raise ValueError(f"{len(word_ids)} words are too few for prompts of their own")
        self._word_ids = word_ids
        self._rng = random.Random(seed)

    def draw(self, length: int) -> list[int]:
        """A prompt that nobody has seen."""
        return self._rng.choices(self._word_ids, k=length)

    def batch(self, workload: Workload) -> list[list[int]]:
        return [self.draw(workload.context) for _ in range(workload.batch_size)]


def poisson_arrivals(count: int, rate_per_s: float, seed: int) -> list[float]:
    """Moments, in seconds from the first, at which requests are sent whether or not others were answered.

    Raises:
        ValueError: The rate is not positive.
    """
    if not rate_per_s > 0:
        raise ValueError("arrivals need a positive rate")
    rng = random.Random(seed)
    moments = [0.0]
    while len(moments) < count:
        moments.append(moments[-1] + rng.expovariate(rate_per_s))
    return moments[:count]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers share before they part."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def spreads_at(report: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Spread]:
    """The spreads by contender at `path`; nothing where that was not measured."""
    node: Any = report
    for name in path:
        node = node.get(name) or {}
    return node  # type: ignore[no-any-return]


def ratio(spreads: Mapping[str, Spread], ours: str, peer: str) -> float | None:
    """Ours to the peer's, of medians of interleaved runs; None where one is missing."""
    if ours not in spreads or peer not in spreads or not spreads[peer]["median"]:
        return None
    return spreads[ours]["median"] / spreads[peer]["median"]


def judge(report: Mapping[str, Any], targets: Sequence[Target] = TARGETS) -> Iterator[dict[str, Any]]:
    """Each target with the measured ratio; `passed` is None where it was not measured."""
    for target in targets:
        found = ratio(spreads_at(report, target.path), target.ours, target.peer)
        passed = None
        if found is not None and math.isfinite(found):
            passed = found <= target.bound if target.is_ceiling else found >= target.bound
        yield {
            "label": target.label,
            "peer": target.peer,
            "bound": target.bound,
            "is_ceiling": target.is_ceiling,
            "ratio": found,
            "passed": passed,
        }
