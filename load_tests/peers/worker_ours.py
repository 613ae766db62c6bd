"""Our engine as a contender: the whole step loop, scheduler and sampler included."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from load_tests.peers.protocol import serve
from load_tests.peers.stepping import Tokens, time_decode, time_prefill

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
        return {
            "version": runner.arithmetic,
            "description": "the same file"
            + (f"; fell back: {runner.fallback_reason}" if runner.fallback_reason else ""),
            "load_s": time.perf_counter() - started,
        }

    def decode(self, *, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        return time_decode(self._add, self._step, self._abort, prompts, steps)

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        return time_prefill(self._add, self._step, prompt)

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

    def _abort(self, names: list[str]) -> None:
        for name in names:
            self._engine.abort(name)

    def _step(self, tokens: Tokens) -> None:
        for output in self._engine.step():
            tokens[output.request_id] += output.token_ids


if __name__ == "__main__":
    contender = Ours()
    serve({"load": contender.load, "decode": contender.decode, "prefill": contender.prefill})
