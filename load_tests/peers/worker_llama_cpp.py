"""llama.cpp as a contender: its C API by way of llama-cpp-python, one batch a step, greedy."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load_tests.peers.protocol import serve

BATCH_TOKENS = 2048
Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0


class LlamaCpp:
    """Holds the prompts of the last decode, so that repeats need not compute them again."""

    def __init__(self) -> None:
        self._model: Any = None
        self._context: Any = None
        self._shape: tuple[int, int] = (0, 0)
        self._held: list[list[int]] = []
        self._firsts: list[int] = []

    def load(self, *, path: str, threads: int, requantised: str = "") -> dict[str, Any]:
        """`requantised`: where to keep the same model requantised to Q4_0, if that is to run."""
        import llama_cpp
        import numpy

        self._api, self._numpy, self._threads = llama_cpp, numpy, threads
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        if requantised and not Path(requantised).exists():
            self._requantise(path, requantised, threads)
        started = time.perf_counter()
        source = requantised or path
        self._model = llama_cpp.llama_model_load_from_file(source.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {source}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        return {
            "version": llama_cpp.__version__,
            "description": "requantised to Q4_0" if requantised else "the same file",
            "system": llama_cpp.llama_print_system_info().decode(),
            "load_s": time.perf_counter() - started,
        }

    def reserve(self, *, kv_tokens: int, max_seqs: int) -> dict[str, Any]:
        """A context that holds so many tokens, for the measurement of memory."""
        self._open(max_seqs, kv_tokens // max_seqs)
        return {}

    def decode(self, *, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """`steps` steps in which every prompt decodes; the prefill is not timed."""
        length = len(prompts[0])
        assert all(len(prompt) == length for prompt in prompts)
        if prompts != self._held:
            self._open(len(prompts), length + steps)
            self._firsts = [self._fill(index, prompt) for index, prompt in enumerate(prompts)]
            self._held = prompts
        memory = self._api.llama_get_memory(self._context)
        for sequence in range(len(prompts)):
            self._api.llama_memory_seq_rm(memory, sequence, length, -1)
        token_ids = [[first] for first in self._firsts]
        started = time.perf_counter()
        for step in range(steps):
            self._put([(row[-1], length + step, sequence, True) for sequence, row in enumerate(token_ids)])
            for sequence, row in enumerate(token_ids):
                row.append(self._greedy(sequence))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": steps * len(prompts), "token_ids": token_ids}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """From an empty context to the first token."""
        self._held = []
        self._open(1, len(prompt) + 1)
        started = time.perf_counter()
        first = self._fill(0, prompt)
        return {"seconds": time.perf_counter() - started, "tokens": len(prompt), "token_ids": [[first]]}

    def _open(self, sequences: int, tokens_each: int) -> None:
        """An empty context of this shape; KV slots that are never used would only be scanned in vain."""
        tokens_each = -(-tokens_each // 256) * 256
        if self._shape == (sequences, tokens_each):
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
            return
        if self._context:
            self._api.llama_free(self._context)
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = sequences * tokens_each
        parameters.n_seq_max = sequences
        parameters.n_batch = BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context of {sequences} x {tokens_each} tokens")
        self._shape = (sequences, tokens_each)

    def _fill(self, sequence: int, prompt: Sequence[int]) -> int:
        for start in range(0, len(prompt), BATCH_TOKENS):
            rows = range(start, min(start + BATCH_TOKENS, len(prompt)))
            self._put([(prompt[row], row, sequence, row == len(prompt) - 1) for row in rows])
        return self._greedy(-1)

    def _put(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wants_logits
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} rows")

    def _greedy(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _requantise(self, source: str, target: str, threads: int) -> None:
        parameters = self._api.llama_model_quantize_default_params()
        parameters.nthread = threads
        parameters.ftype = Q4_0
        parameters.allow_requantize = True
        partial = f"{target}.partial"
        if self._api.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp cannot requantise {source}")
        Path(partial).rename(target)


if __name__ == "__main__":
    contender = LlamaCpp()
    serve(
        {
            "load": contender.load,
            "reserve": contender.reserve,
            "decode": contender.decode,
            "prefill": contender.prefill,
        }
    )
