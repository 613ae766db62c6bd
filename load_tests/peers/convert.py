"""The served model as a transformers directory: bfloat16 weights, dequantised, for peers that read no GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.checkpoint import Checkpoint, load_checkpoint
from engine.model_config import ModelConfig
from engine.tokenizer import Tokenizer

DONE_FILE = "source.json"


def convert(source: Path, directory: Path) -> Path:
    """Write `directory` from a GGUF, unless it was written from these very weights.

    Raises:
        ValueError: Not a plain llama model.
        CheckpointError: The source cannot be read.
    """
    checkpoint = load_checkpoint(source)
    done = directory / DONE_FILE
    origin = {"weights_digest": checkpoint.weights_digest}
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == origin:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    _write_weights(checkpoint, directory)
    tokenizer = Tokenizer.from_path(checkpoint.tokenizer_source)
    _write_json(directory / "config.json", transformers_config(checkpoint.config, tokenizer))
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(done, origin)
    return directory


def transformers_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `LlamaForCausalLM` needs to know.

    Raises:
        ValueError: Not a plain llama model.
    """
    if config.architecture != "llama" or config.rope.scaling != "none":
        raise ValueError("the comparison is written for plain llama models such as smollm2")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope.theta,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(tokenizer.eos_token_ids),
        "dtype": "bfloat16",
    }


def _write_weights(checkpoint: Checkpoint, directory: Path) -> None:
    names = set(checkpoint.config.tensor_shapes())
    tensors = {name: checkpoint.tensors[name].to(torch.bfloat16).contiguous() for name in sorted(names)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
