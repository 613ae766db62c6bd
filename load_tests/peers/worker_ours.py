"""Our engine as a contender: the whole step loop, scheduler and sampler included."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from load_tests.peers.protocol import serve

ZONE = "tenant/bench/case/bench"  # one whose blocks are found again, so that repeats need not compute them
MASTER_KEY = b"a key for benchmarks only"


class Ours:
    def __init__(self) -> None:
        self._ids = count()
        self._engine: Any = None

    def load(
        self,
        *,
        path: str,
        backend: str,
        threads: int,
        block_size: int,
        kv_tokens: int,
        max_model_len: int,
        max_batched_tokens: int,
        max_seqs: int,
    ) -> dict[str, Any]:
        from pathlib import Path

        from deployments.replica import hash_context
        from engine.block_hash import BlockHasher
        from engine.checkpoint import load_checkpoint
        from engine.engine import Engine
        from engine.model_runner import load_runner
        from engine.scheduler import SchedulerConfig
        from engine.tokenizer import Tokenizer

        started = time.perf_counter()
        checkpoint = load_checkpoint(Path(path))
        tokenizer = Tokenizer.from_path(checkpoint.tokenizer_source)
        num_blocks = -(-kv_tokens // block_size)
        runner = load_runner(
            checkpoint,
            dtype="bfloat16",
            block_size=block_size,
            num_blocks=num_blocks,
            backend=backend,
            num_threads=threads,
        )
        self._engine = Engine(
            config=SchedulerConfig(
                max_num_batched_tokens=max_batched_tokens,
                max_num_seqs=max_seqs,
                max_prefill_chunk=max_batched_tokens,
                max_model_len=max_model_len,
            ),
            runner=runner,
            tokenizer=tokenizer,
            hasher=BlockHasher(MASTER_KEY, hash_context(runner, tokenizer, str(checkpoint.config.rope))),
            num_blocks=num_blocks,
        )
        fallback = getattr(runner, "fallback_reason", None)
        return {
            "version": getattr(runner, "arithmetic", f"backend {backend}"),
            "description": "the same file" + (f"; fell back: {fallback}" if fallback else ""),
            "load_s": time.perf_counter() - started,
        }

    def decode(self, *, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """`steps` steps in which every prompt decodes; the prefill is not timed."""
        tokens: dict[str, list[int]] = {self._add(prompt, steps + 512): [] for prompt in prompts}
        while not all(tokens.values()):
            self._step(tokens)
        num_firsts = sum(map(len, tokens.values()))
        started = time.perf_counter()
        for _ in range(steps):
            self._step(tokens)
        seconds = time.perf_counter() - started
        for name in tokens:
            self._engine.abort(name)
        counted = sum(map(len, tokens.values())) - num_firsts
        assert counted == steps * len(prompts), f"{counted} tokens in {steps} steps of {len(prompts)} sequences"
        return {"seconds": seconds, "tokens": counted, "token_ids": list(tokens.values())}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """From the request to its first token."""
        started = time.perf_counter()
        tokens: dict[str, list[int]] = {self._add(prompt, 1): []}
        while not all(tokens.values()):
            self._step(tokens)
        return {
            "seconds": time.perf_counter() - started,
            "tokens": len(prompt),
            "token_ids": list(tokens.values()),
        }

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        from engine.request import Request, SamplingParams
        from engine.zone import Zone, ZoneSpan

        name = str(next(self._ids))
        self._engine.add_request(
            Request(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                zone_spans=(ZoneSpan(len(prompt), Zone.parse(ZONE)),),
            )
        )
        return name

    def _step(self, tokens: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            tokens[output.request_id] += output.token_ids


if __name__ == "__main__":
    contender = Ours()
    serve({"load": contender.load, "decode": contender.decode, "prefill": contender.prefill})
