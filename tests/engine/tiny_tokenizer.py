"""A small tokenizer in the form of GGUF metadata, trained at once on a few sentences. No file, no network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from engine.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED_TOKENS = ("<tool_call>", "</tool_call>")
_CORPUS = (
    "The claim lists two lines for the same procedure on one day. The reviewer asks for the records. "
    'He\'ll see {"risk": "low", "lines": [1, 2, 3], "why": "units"} and we\'re done. DON\'T pay 12,345.67 twice!\n\n'
    "user system assistant\nÜberprüfung der Rechnung: naïve café, 東京の病院 и Москва 😀😀.\n\t  indented\r\n"
)


def tiny_metadata(pre: str = "smollm", **changes: object) -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE with about 500 tokens; `changes` replace `tokenizer.*` fields."""
    tokens, merges = _trained()
    tokens = (*CONTROL_TOKENS, *tokens, *USER_DEFINED_TOKENS, "[PAD0]")
    kinds = [3] * len(CONTROL_TOKENS) + [1] * (len(tokens) - len(CONTROL_TOKENS) - 3) + [4, 4, 5]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    metadata.update({f"tokenizer.{key}": value for key, value in changes.items()})
    return metadata


def tiny_tokenizer(pre: str = "smollm", **changes: object) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(tiny_metadata(pre, **changes), Path("tiny.gguf"))


@cache
def _trained() -> tuple[tuple[str, ...], tuple[str, ...]]:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator([_CORPUS] * 4, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tuple(tokens), tuple(" ".join(pair) for pair in model["merges"])
