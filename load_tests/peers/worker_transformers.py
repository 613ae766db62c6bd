"""transformers as a contender: its model and its cache, bfloat16, a greedy loop."""

from __future__ import annotations

import time
from typing import Any

from load_tests.peers.protocol import serve


class Transformers:
    """Holds the prompts of the last decode, so that repeats need not compute them again."""

    def __init__(self) -> None:
        self._model: Any = None
        self._held: list[list[int]] = []
        self._cache: Any = None
        self._firsts: Any = None

    def load(self, *, directory: str, threads: int) -> dict[str, Any]:
        import torch
        import transformers

        self._torch = torch
        torch.set_num_threads(threads)
        started = time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        return {
            "version": transformers.__version__,
            "description": "bfloat16, SDPA, dynamic cache, no scheduler",
            "load_s": time.perf_counter() - started,
        }

    def decode(self, *, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """`steps` steps in which every prompt decodes; the prefill is not timed."""
        with self._torch.inference_mode():
            if prompts != self._held:
                self._cache, self._firsts = self._fill(prompts)
                self._held = prompts
            tokens = [self._firsts]
            started = time.perf_counter()
            for _ in range(steps):
                output = self._model(tokens[-1], past_key_values=self._cache, use_cache=True)
                tokens.append(output.logits[:, -1:].argmax(-1))
            seconds = time.perf_counter() - started
            self._cache.crop(-steps)
            token_ids = self._torch.cat(tokens, dim=1).tolist()
        return {"seconds": seconds, "tokens": steps * len(prompts), "token_ids": token_ids}

    def prefill(self, *, prompt: list[int]) -> dict[str, Any]:
        """From an empty cache to the first token."""
        started = time.perf_counter()
        with self._torch.inference_mode():
            output = self._model(self._torch.tensor([prompt]), logits_to_keep=1, use_cache=True)
            first = int(output.logits[0, -1].argmax())
        return {"seconds": time.perf_counter() - started, "tokens": len(prompt), "token_ids": [[first]]}

    def _fill(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        """(cache, first tokens (B, 1)), one prompt at a time: a batch of long prompts needs too much memory at once."""
        from transformers import DynamicCache

        layers: list[list[tuple[Any, Any]]] = []
        firsts = []
        for prompt in prompts:
            output = self._model(self._torch.tensor([prompt]), logits_to_keep=1, use_cache=True)
            layers.append([(layer.keys, layer.values) for layer in output.past_key_values.layers])
            firsts.append(output.logits[:, -1:].argmax(-1))
        cache = DynamicCache()
        for index in range(len(layers[0])):
            keys = self._torch.cat([row[index][0] for row in layers])
            values = self._torch.cat([row[index][1] for row in layers])
            cache.update(keys, values, index)
        return cache, self._torch.cat(firsts)


if __name__ == "__main__":
    contender = Transformers()
    serve({"load": contender.load, "decode": contender.decode, "prefill": contender.prefill})
