"""The forward pass in plain torch: every device, and the oracle for faster backends.

Follows transformers' order of operations, residual dtype and norms. On CPU the linear layers run
on weights packed once for oneDNN, where torch has that; elsewhere as `F.linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention import RotaryEmbedding, StepAttention, rotate_
from engine.model_config import ModelConfig

_MAX_ONE_ROW_INPUTS = 1024


class Linear:
    """`y = x W^T + b`. On the packed path a row of `y` depends on its row of `x` only, bit for bit."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, pack: bool) -> None:
        """`weight`: (out, in), in the compute dtype. `pack`: reorder it for oneDNN (see `can_pack`)."""
        self._bias = bias
        self._pack = pack
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if pack else weight
        # A single row over more than 1,024 inputs is summed by oneDNN in another order than many rows are.
        self._min_rows = 2 if pack and weight.shape[1] > _MAX_ONE_ROW_INPUTS else 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out)."""
        if not self._pack:
            return F.linear(x, self._weight, self._bias)
        rows = x.shape[0]
        if rows < self._min_rows:
            x = x.expand(self._min_rows, -1).contiguous()
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y[:rows]


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None  # (H + G, D)
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class TorchModel:
    """A decoder with its weights on one device, in one dtype."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype, device: str
    ) -> None:
        """`tensors`: every name of `config.tensor_shapes()`; each is read once and converted."""
        self._config = config
        self._weights = _Weights(tensors, dtype, device)
        embedding = self._weights.get("model.embed_tokens.weight")
        self._embedding = embedding
        self._layers = [self._load_layer(f"model.layers.{index}.") for index in range(config.num_layers)]
        self._norm = self._weights.get("model.norm.weight")
        head = embedding if config.tie_word_embeddings else self._weights.get("lm_head.weight")
        self._head = self._weights.linear(head, None)
        self._rope = RotaryEmbedding(config.rope, config.head_dim, dtype, device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: StepAttention,
        sampled_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Logits after some of the step's tokens; the KV cache receives every token's keys and values.

        Args:
            token_ids: (T,) int64 in [0, vocab_size).
                positions: (T,) int64.
            attention: Of the same T tokens.
            sampled_rows: (R,) int64, rows of the T tokens.

        Returns:
            (R, vocab_size) float32.
        """
        hidden = self._embedding.index_select(0, token_ids)
        cosine, signed_sine = self._rope.at(positions)
        for index, layer in enumerate(self._layers):
            query, key_value = self._qkv(layer, hidden, cosine, signed_sine)
            hidden = hidden + layer.output(attention(query, key_value, index))
            hidden = hidden + self._mlp(layer, hidden)
        if not sampled_rows.numel():  # no chunk of the step samples
            return torch.empty((0, self._config.vocab_size), dtype=torch.float32, device=hidden.device)
        hidden = self._rms_norm(hidden.index_select(0, sampled_rows), self._norm)
        return self._head(hidden).float()

    def _qkv(
        self, layer: _Layer, hidden: torch.Tensor, cosine: torch.Tensor, signed_sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries (T, H, D), and rotated keys before values (T, 2 * G, D)."""
        config = self._config
        qkv = layer.qkv(self._rms_norm(hidden, layer.input_norm)).view(hidden.shape[0], -1, config.head_dim)
        query_key = qkv[:, : config.num_heads + config.num_kv_heads]
        if layer.qk_norm is not None:
            query_key.copy_(F.rms_norm(query_key, (config.head_dim,), None, config.rms_norm_eps))
            query_key.mul_(layer.qk_norm)
        rotate_(query_key, cosine, signed_sine)
        return qkv[:, : config.num_heads], qkv[:, config.num_heads :]

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._rms_norm(hidden, layer.mlp_norm)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up))

    def _rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self._config.rms_norm_eps)

    def _load_layer(self, prefix: str) -> _Layer:
        config, weights = self._config, self._weights
        qk_norm = None
        if config.has_qk_norm:
            query_norm = weights.get(prefix + "self_attn.q_norm.weight").expand(config.num_heads, -1)
            key_norm = weights.get(prefix + "self_attn.k_norm.weight").expand(config.num_kv_heads, -1)
            qk_norm = torch.cat((query_norm, key_norm))
        return _Layer(
            input_norm=weights.get(prefix + "input_layernorm.weight"),
            qkv=weights.fused(prefix + "self_attn.", ("q_proj", "k_proj", "v_proj"), config.has_qkv_bias),
            qk_norm=qk_norm,
            output=weights.fused(prefix + "self_attn.", ("o_proj",)),
            mlp_norm=weights.get(prefix + "post_attention_layernorm.weight"),
            gate_up=weights.fused(prefix + "mlp.", ("gate_proj", "up_proj")),
            down=weights.fused(prefix + "mlp.", ("down_proj",)),
        )


class _Weights:
    """Reads, converts and places weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._device = device
        self._pack = can_pack(dtype, device)

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name].to(self._device, self._dtype)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(weight, bias, pack=self._pack)

    def fused(self, prefix: str, names: tuple[str, ...], has_bias: bool = False) -> Linear:
        """One layer of several that share their input."""
        weight = torch.cat([self.get(f"{prefix}{name}.weight") for name in names])
        bias = torch.cat([self.get(f"{prefix}{name}.bias") for name in names]) if has_bias else None
        return self.linear(weight, bias)


def can_pack(dtype: torch.dtype, device: str) -> bool:
    """True where torch offers oneDNN linear layers on packed weights for this dtype and device."""
    if torch.device(device).type != "cpu" or not _has_onednn():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
