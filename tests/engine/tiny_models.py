"""Tiny random decoders as transformers builds them, written as model directories and as GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engine.k_quants import QUANTIZERS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def build(family: str, seed: int = 0, *, spread: float = 0.2, **overrides: Any) -> PreTrainedModel:
    """A float32 model with weights large enough that greedy tokens vary, biases and norms included.

    `spread`: standard deviation of matrices and biases.
    """
    config_class, model_class = _CLASSES[family]
    fields = _SMALL | ({"head_dim": 16} if family == "qwen3" else {}) | overrides
    model = model_class(config_class(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else spread * noise)
    return model


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """(T, V) by transformers."""
    logits: torch.Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def reference_greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def interleave_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Row 2i of a head is its row i, row 2i + 1 its row i + D/2: what rotating neighbouring pairs needs."""
    result = np.empty_like(weight)
    head_dim = len(weight) // num_heads
    for head in range(num_heads):
        for index in range(head_dim):
            source = index // 2 + (index % 2) * (head_dim // 2)
            result[head * head_dim + index] = weight[head * head_dim + source]
    return result


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    quant_type: str | Callable[[str], str] = "F32",
    skip: Sequence[str] = (),
    extra_fields: Mapping[str, object] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The model as a GGUF file: matrices in `quant_type` where their rows allow it, vectors in F32.

    `quant_type`: a type's name, or what gives one for a tensor's GGUF name.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (extra_fields or {}).items():
        _add_field(writer, key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        target = gguf_name(name)
        if target in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.numpy()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            values = interleave_rows(values, heads[part])
        _add_tensor(writer, target, values, quant_type if isinstance(quant_type, str) else quant_type(target))
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        adders[type(value)](key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, quant_type: str) -> None:
    wanted = gguf.GGMLQuantizationType[quant_type]
    if values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        wanted = gguf.GGMLQuantizationType.F32
    quantize = QUANTIZERS.get(wanted.name) or partial(gguf.quants.quantize, qtype=wanted)
    writer.add_tensor(name, quantize(values), raw_dtype=wanted)
