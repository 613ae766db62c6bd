"""The forward pass of one sequence in float64, written for reading: what the kernels are judged by.

Letters: T tokens, L layers, G KV heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.attention import inverse_frequencies
from engine.model_config import ModelConfig

GROUP = 32
"""Activations that share a scale."""
FINE_INPUTS = ("q_proj", "k_proj", "v_proj", "lm_head", "embed_tokens")
"""Matrices (the last as the head) whose input's rounding shows in the output."""
PORTABLE_FINE_INPUTS = (*FINE_INPUTS, "gate_proj", "up_proj")
KEY_TILE = 128
"""Keys whose attention weights are computed together, counted from position 0."""


class Oracle:
    """A decoder over one set of weights.

    `is_rounded`: activations go through integers in groups of 32 before every matrix, of 16 bits before `fine_inputs`
    and of 8 before the others, and queries, keys, values and attention weights go through bfloat16, as in the native
    backend; what is left between the two is the order of float32 sums. Otherwise nothing is rounded.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        is_rounded: bool,
        fine_inputs: tuple[str, ...] = FINE_INPUTS,
    ) -> None:
        self._config = config
        self._weights = {name: tensors[name].double() for name in config.tensor_shapes()}
        self._is_rounded = is_rounded
        self._fine_inputs = fine_inputs
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).double()

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(T, V) float64: row i is what follows the first i + 1 tokens."""
        return self.extend(token_ids, None)[0]

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int], past: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after each token, and what the tokens add to the cache.

        Args:
            token_ids: T of them, which follow those of `past`.
            past: (L, 2, G, P, D) float64, keys (rotated) and values of the P tokens before; None where there are
                none.

        Returns:
            (T, V) and (L, 2, G, T, D), float64.
        """
        config = self._config
        if past is None:
            past = torch.empty(config.num_layers, 2, config.num_kv_heads, 0, config.head_dim, dtype=torch.float64)
        hidden = self._weights["model.embed_tokens.weight"][list(token_ids)]
        added = []
        for index in range(config.num_layers):
            layer = f"model.layers.{index}."
            normed = self._norm(layer + "input_layernorm", hidden)
            query, key_value = self._project(layer + "self_attn.", normed, past.shape[3])
            added.append(key_value)
            mixed = self._attend(query, torch.cat((past[index], key_value), 2))
            hidden = hidden + self._linear(layer + "self_attn.o_proj", mixed)
            hidden = hidden + self._mlp(layer + "mlp.", self._norm(layer + "post_attention_layernorm", hidden))
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return self._linear(head, self._norm("model.norm", hidden)), torch.stack(added)

    def _project(self, prefix: str, x: torch.Tensor, first_position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries (heads, T, D), rotated keys and values (2, G, T, D)."""
        query, key, value = (self._heads(self._linear(f"{prefix}{part}_proj", x)) for part in "qkv")
        if self._config.has_qk_norm:
            query, key = self._norm(prefix + "q_norm", query), self._norm(prefix + "k_norm", key)
        query, key = self._rotate(query, first_position), self._rotate(key, first_position)
        return self._bfloat16(query), self._bfloat16(torch.stack((key, value)))

    def _attend(self, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """(heads, T, D) over (2, G, P + T, D) -> (T, heads * D)."""
        key, value = key_value.repeat_interleave(self._config.num_heads // self._config.num_kv_heads, 1)
        scores = query @ key.transpose(1, 2) * self._config.head_dim**-0.5
        num_past = scores.shape[2] - scores.shape[1]
        is_later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + num_past)
        scores = scores.masked_fill(is_later, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = self._round_weights(weights) @ value / weights.sum(-1, keepdim=True)
        return mixed.transpose(0, 1).flatten(1)

    def _mlp(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear(prefix + "gate_proj", x), self._linear(prefix + "up_proj", x)
        return self._linear(prefix + "down_proj", gate * gate.sigmoid() * up)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(T, heads * D) -> (heads, T, D)."""
        return x.view(x.shape[0], -1, self._config.head_dim).transpose(0, 1)

    def _rotate(self, heads: torch.Tensor, first_position: int) -> torch.Tensor:
        positions = first_position + torch.arange(heads.shape[1]).double()
        angles = torch.outer(positions, self._frequencies)
        first, second = heads.chunk(2, -1)
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x * (mean_square + self._config.rms_norm_eps).rsqrt() * self._weights[name + ".weight"]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        result = self._integers(x, is_fine=name.endswith(self._fine_inputs)) @ self._weights[name + ".weight"].T
        bias = self._weights.get(name + ".bias")
        return result if bias is None else result + bias

    def _integers(self, x: torch.Tensor, *, is_fine: bool) -> torch.Tensor:
        if not self._is_rounded:
            return x
        groups = x.unflatten(-1, (-1, GROUP))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        exact = groups / scale.clamp_min(1e-30)
        codes = exact.round()
        if is_fine:
            codes += ((exact - codes) * 256).round().clamp(-127, 127) / 256
        return (codes * scale).flatten(-2)

    def _round_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights are rounded as multiples of the greatest in their tile of keys."""
        tiles = weights.split(KEY_TILE, -1)
        peaks = [tile.amax(-1, keepdim=True).clamp_min(1e-300) for tile in tiles]
        return torch.cat([self._bfloat16(tile / peak) * peak for tile, peak in zip(tiles, peaks, strict=True)], -1)

    def _bfloat16(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().double() if self._is_rounded else x
