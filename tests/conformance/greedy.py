"""The greedy oracle: transformers in float32 over the same weights, and prompts of 1 to 3,000 tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.block_hash import BlockHasher, HashContext
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.engine import Engine
from engine.model_runner import ModelRunner
from engine.request import Request, SamplingParams
from engine.scheduler import ScheduledChunk, SchedulerConfig
from engine.tokenizer import Tokenizer
from engine.zone import PUBLIC, ZoneSpan

PROMPT_LENGTHS = (
    1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 64, 65, 100, 127, 128, 129, 200, 255, 300, 400, 511, 700, 1000, 3000
)  # fmt: skip
NUM_OUTPUT_TOKENS = 8
_WORDS = [
    "claim",
    "line",
    "units",
    "member",
    "provider",
    "plan",
    "allowed",
    "amount",
    "paid",
    "denied",
    "modifier",
    "review",
    "policy",
    "record",
    "visit",
    "office",
    "lab",
    "imaging",
    "therapy",
    "surgery",
    "anesthesia",
    "duplicate",
    "bundled",
    "diagnosis",
    "procedure",
    "date",
    "service",
    "billed",
    "charge",
    "note",
    "the",
    "of",
    "and",
    "to",
    "in",
    "for",
    "with",
    "on",
    "by",
    "from",
    "was",
    "is",
    "are",
    "not",
    "25",
    "59",
    "2026",
    "1",
    "2",
    "3",
    "10",
    "45",
    "120",
    "0.00",
]


def make_prompts(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """One prompt a length, none a prefix of another."""
    prompts = []
    for length in PROMPT_LENGTHS:
        source = random.Random(length)
        token_ids: list[int] = []
        while len(token_ids) < length:
            token_ids += tokenizer.encode(" ".join(source.choices(_WORDS, k=64)) + ". ")
        prompts.append(tuple(token_ids[:length]))
    return prompts


class TransformersOracle:
    """LlamaForCausalLM of the transformers library with the checkpoint's dequantised weights, float32."""

    def __init__(self, path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        checkpoint = load_checkpoint(path)
        config = checkpoint.config
        with torch.device("meta"):
            self._model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    rms_norm_eps=config.rms_norm_eps,
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
                    max_position_embeddings=config.max_position,
                    tie_word_embeddings=config.tie_word_embeddings,
                )
            )
        self._model.to_empty(device="cpu")
        self._load(checkpoint)
        self._model.eval()

    def _load(self, checkpoint: Checkpoint) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        tensors = {name: checkpoint.tensors[name].float() for name in checkpoint.config.tensor_shapes()}
        missing, unexpected = self._model.load_state_dict(tensors, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        self._model.tie_weights()
        # Buffers are not weights: made on the meta device, they hold nothing until built again.
        self._model.model.rotary_emb = LlamaRotaryEmbedding(self._model.config)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """The `count` most likely tokens after the prompt, one after the other."""
        output: list[int] = []
        token_ids, cache = torch.tensor([list(prompt)]), None
        while len(output) < count:
            step = self._model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            output.append(int(step.logits[0, -1].argmax()))
            token_ids, cache = torch.tensor([[output[-1]]]), step.past_key_values
        return tuple(output)

    @torch.inference_mode()
    def regrets(self, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
        """By how much each token's logit is below the best one's, given the prompt and the tokens before it."""
        token_ids = torch.tensor([[*prompt, *output[:-1]]])
        logits = self._model(token_ids, use_cache=False, logits_to_keep=len(output)).logits[0]
        chosen = logits.gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)
        regrets: list[float] = (logits.amax(1) - chosen).tolist()
        return regrets


def greedy_alone(runner: ModelRunner, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """A backend's own answer: the prompt in one chunk, nothing cached, nothing else in any step; no engine."""
    layout = runner.layout
    table = tuple(range(layout.num_blocks_for(len(prompt) + count)))
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + count:
        row = runner.execute([ScheduledChunk("alone", start, tuple(tokens[start:]), table, True)])[0]
        start = len(tokens)
        tokens.append(int(row.argmax()))
    return tuple(tokens[len(prompt) :])


def make_engine(runner: ModelRunner, tokenizer: Tokenizer, *, num_blocks: int | None = None, **config: int) -> Engine:
    context = HashContext(runner.weights_digest, tokenizer.digest, runner.layout.fingerprint(), "rope")
    return Engine(
        config=SchedulerConfig(**config),
        runner=runner,
        tokenizer=tokenizer,
        hasher=BlockHasher(b"conformance-master-key-32-bytes!", context),
        num_blocks=num_blocks or runner.num_blocks,
    )


def make_request(name: str, prompt: tuple[int, ...], num_output_tokens: int = NUM_OUTPUT_TOKENS) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=num_output_tokens, ignore_eos=True),
        zone_spans=(ZoneSpan(len(prompt), PUBLIC),),
    )


def run_all(engine: Engine, requests: Sequence[Request]) -> dict[str, tuple[int, ...]]:
    """Run requests to their end, all at once; tokens by request id. The engine is empty afterwards."""
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, tuple[int, ...]] = {request.request_id: () for request in requests}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    return tokens
