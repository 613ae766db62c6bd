"""Speed of the bare model step: our runner against transformers on the same weights, interleaved.

No scheduler, sampler or HTTP. Prints a table and, last, one line of JSON. Counts of torch operations
come first (they are exact on any machine), then tokens a second, medians with least and greatest, then their ratios.
load_tests.peers compares the whole step, scheduler included, with every peer.

    python -m load_tests.bench_engine --threads 2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint import Checkpoint, load_checkpoint
from engine.model_runner import BACKENDS, ModelRunner, load_runner
from engine.model_store import resolve
from engine.scheduler import ScheduledChunk
from load_tests.figures import Spread, spread, turns

CONTEXT_TOKENS = 512
BATCH_SIZES = (1, 4, 16)
BLOCK_SIZE = 16
DECODE_STEPS = 4

Workload = Callable[[], int]
"""Runs once and returns how many tokens it computed."""


class OurRunner:
    """Workloads of `ModelRunner.execute`."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, backend: str) -> None:
        blocks_each = -(-(CONTEXT_TOKENS + DECODE_STEPS) // BLOCK_SIZE)
        count = max(BATCH_SIZES)
        self._tables = [tuple(range(row * blocks_each, (row + 1) * blocks_each)) for row in range(count)]
        self.runner: ModelRunner = load_runner(
            checkpoint, dtype=dtype, block_size=BLOCK_SIZE, num_blocks=count * blocks_each, backend=backend
        )
        self._prompts = prompts(checkpoint.config.vocab_size)
        for row in range(count):
            self._prefill(row)

    def prefill(self) -> int:
        return self._prefill(0)

    def decode(self, batch_size: int) -> int:
        for step in range(DECODE_STEPS):
            self.runner.execute(
                [
                    ScheduledChunk(str(row), CONTEXT_TOKENS + step, (7,), self._tables[row], True)
                    for row in range(batch_size)
                ]
            )
        return batch_size * DECODE_STEPS

    def _prefill(self, row: int) -> int:
        tokens = tuple(self._prompts[row].tolist())
        self.runner.execute([ScheduledChunk(str(row), 0, tokens, self._tables[row], True)])
        return len(tokens)


class Transformers:
    """The same workloads with `LlamaForCausalLM` and its own cache."""

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self._model = transformers_model(checkpoint, getattr(torch, dtype))
        self._prompts = prompts(checkpoint.config.vocab_size)
        self._caches: dict[int, Any] = {}

    @torch.inference_mode()
    def prefill(self) -> int:
        self._model(self._prompts[:1], logits_to_keep=1, use_cache=True)
        return CONTEXT_TOKENS

    @torch.inference_mode()
    def decode(self, batch_size: int) -> int:
        if batch_size not in self._caches:
            filled = self._model(self._prompts[:batch_size], logits_to_keep=1, use_cache=True)
            self._caches[batch_size] = filled.past_key_values
        cache = self._caches[batch_size]
        token = torch.full((batch_size, 1), 7)
        for _ in range(DECODE_STEPS):
            self._model(token, past_key_values=cache, use_cache=True)
        cache.crop(-DECODE_STEPS)
        return batch_size * DECODE_STEPS


def prompts(vocab_size: int) -> torch.Tensor:
    """(B, CONTEXT_TOKENS) token ids, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (max(BATCH_SIZES), CONTEXT_TOKENS), generator=generator)


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """`LlamaForCausalLM` with the checkpoint's weights, dequantised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = checkpoint.config
    if config.architecture != "llama" or config.rope.scaling != "none":
        raise SystemExit("the comparison is written for plain llama models such as smollm2")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position,
            rope_parameters={"rope_theta": config.rope.theta, "rope_type": "default"},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    model.load_state_dict(dict(checkpoint.tensors), strict=False)
    model.tie_weights()
    return model.to(dtype).eval()


class OperationCounter(TorchDispatchMode):
    """Counts the torch operations that reach a kernel or a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(workload: Workload) -> int:
    with OperationCounter() as counter:
        workload()
    return counter.count


def interleave(contenders: dict[str, Workload], repeats: int) -> dict[str, Spread]:
    """Tokens a second of each, measured in turn `repeats` times after one warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for workload in contenders.values():
        workload()
    for _, name in turns(list(contenders), repeats):
        started = time.perf_counter()
        tokens = contenders[name]()
        rates[name].append(tokens / (time.perf_counter() - started))
    return {name: spread(values) for name, values in rates.items()}


def measure(checkpoint: Checkpoint, *, dtype: str, backend: str, repeats: int) -> dict[str, Any]:
    """Operation counts, tokens a second and ratios of every workload."""
    started = time.perf_counter()
    ours = OurRunner(checkpoint, dtype, backend)
    load_s = time.perf_counter() - started
    theirs = Transformers(checkpoint, dtype)
    workloads: dict[str, dict[str, Workload]] = {
        f"decode B={size}": {
            "ours": lambda size=size: ours.decode(size),  # type: ignore[misc]
            "transformers": lambda size=size: theirs.decode(size),  # type: ignore[misc]
        }
        for size in BATCH_SIZES
    }
    workloads[f"prefill {CONTEXT_TOKENS}"] = {"ours": ours.prefill, "transformers": theirs.prefill}
    results: dict[str, Any] = {}
    for name, contenders in workloads.items():
        rates = interleave(contenders, repeats)
        steps = 1 if name.startswith("prefill") else DECODE_STEPS
        results[name] = {
            "operations_per_step": {who: count_operations(run) // steps for who, run in contenders.items()},
            "tokens_per_s": {who: {key: round(value, 1) for key, value in rate.items()} for who, rate in rates.items()},
            "ratio": round(rates["ours"]["median"] / rates["transformers"]["median"], 2),
        }
    return {
        "dtype": dtype,
        "backend": backend,
        "arithmetic": ours.runner.arithmetic,
        "backend_fallback": ours.runner.fallback_reason,
        "threads": torch.get_num_threads(),
        "context_tokens": CONTEXT_TOKENS,
        "repeats": repeats,
        "load_and_fill_s": round(load_s, 2),
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'workload':<14}{'ops ours':>10}{'ops hf':>10}{'ours tok/s':>24}{'hf tok/s':>24}{'ratio':>8}"]
    for name, row in report["results"].items():
        operations, rates = row["operations_per_step"], row["tokens_per_s"]
        lines.append(
            f"{name:<14}{operations['ours']:>10}{operations['transformers']:>10}"
            f"{_cell(rates['ours']):>24}{_cell(rates['transformers']):>24}{row['ratio']:>8.2f}"
        )
    return "\n".join(lines)


def _cell(rate: Spread) -> str:
    return f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a named model or a path")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--backend", default="native", choices=BACKENDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache-dir", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = resolve(options.model, options.cache_dir) if options.cache_dir else resolve(options.model)
    report = measure(load_checkpoint(path), dtype=options.dtype, backend=options.backend, repeats=options.repeats)
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
