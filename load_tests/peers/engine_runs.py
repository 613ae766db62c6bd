"""Engine level: every contender loaded once, then each workload in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from load_tests.figures import Spread, spread, turns
from load_tests.peers.contenders import Contender, Settings
from load_tests.peers.memory import memory_mib
from load_tests.peers.protocol import WorkerError
from load_tests.peers.workloads import Prompts, Workload, common_prefix

LOAD_TIMEOUT_S = 900.0  # vLLM compiles the model the first time
RUN_TIMEOUT_S = 900.0
SETTLE_S = 0.3  # OpenMP's threads spin for a while after their last region
AGREEMENT_STEPS = 31
MEMORY_STEPS = 8
MEMORY_WORKLOAD = Workload(16, 512, MEMORY_STEPS)
MEMORY_PROMPT_TOKENS = 2048

Say = Callable[[str], None]


class Caller(Protocol):
    """A worker, as far as a measurement needs it."""

    def call(self, command: str, *, timeout_s: float, **arguments: Any) -> Any: ...


class Field:
    """The contenders that still run. One that fails is out, with its reason, and the others go on."""

    def __init__(self, workers: MutableMapping[str, Caller], say: Say, settle_s: float = SETTLE_S) -> None:
        self.workers = workers
        self.missing: dict[str, str] = {}
        self._say = say
        self._settle_s = settle_s

    def call(self, name: str, command: str, timeout_s: float = RUN_TIMEOUT_S, **arguments: Any) -> Any:
        """The result; None where the contender is out, now or before."""
        if name not in self.workers:
            return None
        time.sleep(self._settle_s)
        try:
            return self.workers[name].call(command, timeout_s=timeout_s, **arguments)
        except WorkerError as error:
            self.drop(name, str(error))
            return None

    def drop(self, name: str, reason: str) -> None:
        self.workers.pop(name, None)
        self.missing[name] = reason
        self._say(f"{name} is out: {reason}")

    def measure(self, workload: Workload, repeats: int, prompts: Prompts) -> dict[str, Spread]:
        """Tokens a second, by contender: a warm-up of each, then turns on the same prompts."""
        batch = prompts.batch(workload)
        rates: dict[str, list[float]] = {name: [] for name in self.workers}
        for name in list(self.workers):
            self._run(name, workload, batch)
        fresh = [prompts.batch(workload) for _ in range(repeats)]  # a prefill's prompt must be one that nobody holds
        for repeat, name in turns(list(self.workers), repeats):
            result = self._run(name, workload, batch if workload.steps else fresh[repeat])
            if result is not None:
                rates[name].append(result["tokens"] / result["seconds"])
        return {name: spread(values) for name, values in rates.items() if len(values) == repeats}

    def agreement(self, texts: Mapping[str, Sequence[int]], reference: str = "ours") -> dict[str, dict[str, int]]:
        """By contender and prompt: how many greedy tokens are the reference's before the first that is not."""
        answers: dict[str, dict[str, list[int]]] = {}
        for name in list(self.workers):
            answers[name] = {}
            for label, prompt in texts.items():
                result = self.call(name, "decode", prompts=[list(prompt)], steps=AGREEMENT_STEPS)
                if result is not None:
                    answers[name][label] = result["token_ids"][0]
        expected = answers.pop(reference, {})
        return {
            name: {label: common_prefix(expected[label], ids) for label, ids in found.items() if label in expected}
            for name, found in answers.items()
        }

    def _run(self, name: str, workload: Workload, batch: Sequence[Sequence[int]]) -> Any:
        if workload.steps:
            return self.call(name, "decode", prompts=batch, steps=workload.steps)
        return self.call(name, "prefill", prompt=batch[0])


def run_engine(
    listed: Mapping[str, Contender],
    workloads: Sequence[Workload],
    *,
    settings: Settings,
    repeats: int,
    prompts: Prompts,
    texts: Mapping[str, Sequence[int]],
    say: Say,
) -> dict[str, Any]:
    """`contenders`, `agreement` and `engine` of the report."""
    with ExitStack() as stack:
        field = Field({}, say)
        found = {name: _load(field, stack, contender, settings) for name, contender in listed.items()}
        report: dict[str, Any] = {"agreement": field.agreement(texts), "engine": {}}
        for workload in workloads:
            say(f"{workload.label}: {repeats} turns of {', '.join(field.workers)}")
            report["engine"][workload.name] = field.measure(workload, repeats, prompts)
        report["contenders"] = {
            name: {"label": listed[name].label, **(loaded or {})}
            | ({"missing": field.missing[name]} if name in field.missing else {})
            for name, loaded in found.items()
        }
        return report


def run_memory(
    listed: Mapping[str, Contender], *, settings: Settings, repeats: int, prompts: Prompts, say: Say
) -> dict[str, Any]:
    """MiB of a fresh process with the KV capacity its contender was given, after a long prefill and a full batch."""
    peaks: dict[str, list[float]] = {name: [] for name in listed}
    shares: dict[str, list[float]] = {name: [] for name in listed}
    for _, name in turns(list(listed), repeats):
        say(f"memory of {name}")
        with ExitStack() as stack:
            field = Field({}, say)
            if _load(field, stack, listed[name], settings) is None:
                continue
            batch = prompts.batch(MEMORY_WORKLOAD)
            done = field.call(name, "prefill", prompt=prompts.draw(MEMORY_PROMPT_TOKENS))
            if done is None or field.call(name, "decode", prompts=batch, steps=MEMORY_STEPS) is None:
                continue
            figures = memory_mib(field.workers[name].pid)  # type: ignore[attr-defined]
            peaks[name].append(figures["peak_mib"])
            shares[name].append(figures["pss_mib"])
    return {
        "kv_tokens": {name: contender.arguments.get("kv_tokens") for name, contender in listed.items()},
        "peak_mib": {name: spread(values) for name, values in peaks.items() if values},
        "pss_mib": {name: spread(values) for name, values in shares.items() if values},
    }


def _load(field: Field, stack: ExitStack, contender: Contender, settings: Settings) -> Any:
    """What the worker says of itself; None where it is out."""
    if reason := contender.missing_reason(settings.out):
        field.drop(contender.name, reason)
        return None
    field.workers[contender.name] = stack.enter_context(contender.start(settings.out))
    return field.call(contender.name, "load", timeout_s=LOAD_TIMEOUT_S, **contender.arguments)
