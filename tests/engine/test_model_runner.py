from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.errors import IntegrityError
from engine.model_runner import BACKENDS, load_runner
from engine.scheduler import ScheduledChunk
from tests.engine import tiny_models

NUM_BLOCKS = 64

needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="bit-for-bit independence is claimed, and holds, on the AVX-512 paths of oneDNN and MKL",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each family's transformers model and the directory it is saved in."""
    root = tmp_path_factory.mktemp("models")
    built = {family: tiny_models.build(family) for family in tiny_models.FAMILIES}
    return {family: (model, tiny_models.save(model, root / family)) for family, model in built.items()}


def make_runner(path, *, block_size=8, dtype="float32", num_blocks=NUM_BLOCKS):
    """A runner whose cache holds NaN wherever nothing has been written."""
    runner = load_runner(load_checkpoint(path), dtype=dtype, block_size=block_size, num_blocks=num_blocks)
    runner.kv_buffer.fill_(255)
    return runner


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 96, length)]


class Sequence:
    """A greedy sequence under way: its tokens, its blocks, and how far it has been computed."""

    def __init__(self, name: str, tokens: list[int], num_new: int, chunk_sizes, free_blocks, block_size: int):
        self.name = name
        self.tokens = list(tokens)
        self.prompt_length = len(tokens)
        self.target_length = len(tokens) + num_new
        self.computed = 0
        self.chunk_sizes = chunk_sizes
        count = -(-self.target_length // block_size)
        self.blocks = tuple(free_blocks.pop() for _ in range(count))

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.target_length

    def next_chunk(self) -> ScheduledChunk:
        size = min(self.chunk_sizes(), len(self.tokens) - self.computed)
        tokens = tuple(self.tokens[self.computed : self.computed + size])
        samples = self.computed + size == len(self.tokens)
        chunk = ScheduledChunk(self.name, self.computed, tokens, self.blocks, samples)
        self.computed += size
        return chunk

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]


def run_to_end(runner, sequences) -> None:
    while active := [sequence for sequence in sequences if not sequence.done]:
        chunks = [sequence.next_chunk() for sequence in active]
        logits = runner.execute(chunks)
        sampling = [sequence for sequence, chunk in zip(active, chunks, strict=True) if chunk.samples]
        assert logits.shape == (len(sampling), runner.vocab_size)
        assert logits.dtype is torch.float32
        for sequence, row in zip(sampling, logits, strict=True):
            sequence.tokens.append(int(row.argmax()))


def free_blocks(seed: int = 0) -> list[int]:
    blocks = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(blocks)
    return blocks


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_greedy_tokens_are_those_of_transformers_whatever_the_chunk(models, family, chunk):
    model, path = models[family]
    tokens = prompt(37)
    sequence = Sequence("r", tokens, 12, lambda: chunk, free_blocks(), 8)
    run_to_end(make_runner(path), [sequence])
    assert sequence.output == tiny_models.reference_greedy(model, tokens, 12)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_greedy_tokens_are_those_of_transformers_whatever_the_block_size(models, block_size):
    model, path = models["llama"]
    tokens = prompt(37)
    sequence = Sequence("r", tokens, 12, lambda: 10, free_blocks(), block_size)
    run_to_end(make_runner(path, block_size=block_size), [sequence])
    assert sequence.output == tiny_models.reference_greedy(model, tokens, 12)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_mixed_batches_give_every_sequence_its_own_tokens(models, family):
    model, path = models[family]
    generator = random.Random(3)
    free = free_blocks()
    sequences = [
        Sequence(str(index), prompt(length, index), 10, lambda: generator.choice([1, 2, 7, 30]), free, 8)
        for index, length in enumerate([1, 9, 33, 16, 70])
    ]
    run_to_end(make_runner(path), sequences)
    for sequence in sequences:
        expected = tiny_models.reference_greedy(model, sequence.tokens[: sequence.prompt_length], 10)
        assert sequence.output == expected


def test_shared_prefix_blocks_are_read_and_not_rewritten(models):
    model, path = models["llama"]
    runner = make_runner(path)
    tokens = prompt(30)
    runner.execute([ScheduledChunk("first", 0, tuple(tokens[:16]), (4, 5), False)])
    shared = runner.kv_buffer.clone()
    logits = runner.execute([ScheduledChunk("second", 16, tuple(tokens[16:]), (4, 5, 9, 8), True)])
    expected = tiny_models.reference_logits(model, tokens)[-1]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    size = runner.layout.block_bytes
    assert torch.equal(runner.kv_buffer[4 * size : 6 * size], shared[4 * size : 6 * size])


def test_chunk_that_does_not_sample_has_no_row(models):
    runner = make_runner(models["llama"][1])
    chunks = [
        ScheduledChunk("a", 0, (1, 2, 3), (0,), False),
        ScheduledChunk("b", 0, (4, 5), (1,), True),
        ScheduledChunk("c", 0, (6,), (2,), False),
        ScheduledChunk("d", 0, (7,), (3,), True),
    ]
    logits = runner.execute(chunks)
    assert logits.shape == (2, 96)
    torch.testing.assert_close(logits[0], runner.execute(chunks[1:2])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], runner.execute(chunks[3:])[0], rtol=1e-4, atol=1e-4)
    assert runner.execute([chunks[0], chunks[2]]).shape == (0, 96)
    assert runner.execute([]).shape == (0, 96)


def test_moved_blocks_continue_the_sequence_elsewhere(models):
    """What a transfer does: the bytes of the blocks go to other blocks of another runner."""
    model, path = models["qwen2"]
    tokens = prompt(21)
    source, target = make_runner(path), make_runner(path)
    source.execute([ScheduledChunk("r", 0, tuple(tokens[:20]), (3, 7, 2), False)])
    view = source.kv_buffer.view(NUM_BLOCKS, -1), target.kv_buffer.view(NUM_BLOCKS, -1)
    for from_block, to_block in ((3, 40), (7, 0), (2, 11)):
        view[1][to_block] = view[0][from_block]
    logits = target.execute([ScheduledChunk("r", 20, (tokens[20],), (40, 0, 11), True)])
    torch.testing.assert_close(logits[0], tiny_models.reference_logits(model, tokens)[-1], rtol=1e-4, atol=1e-4)


@needs_avx512
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_logits_do_not_depend_on_batch_or_chunks(models, family):
    runner = make_runner(models[family][1], dtype="bfloat16")
    lengths = (5, 9, 40, 41, 90)
    free = free_blocks()
    chunks, alone = [], []
    for index, length in enumerate(lengths):
        tokens = prompt(length, index)
        blocks = tuple(free.pop() for _ in range(-(-length // 8)))
        whole = runner.execute([ScheduledChunk("whole", 0, tuple(tokens), blocks, True)])
        edges = sorted({0, 3, length // 2, length - 1})
        for first, last in pairwise(edges):
            runner.execute([ScheduledChunk("part", first, tuple(tokens[first:last]), blocks, False)])
        chunks.append(ScheduledChunk(str(index), length - 1, (tokens[-1],), blocks, True))
        alone.append(whole)
    assert torch.equal(runner.execute(chunks), torch.cat(alone))


def test_scrub_zeroes_the_named_blocks_and_no_others(models):
    runner = make_runner(models["llama"][1])
    runner.scrub([3, 5])
    zeroed = (runner.kv_buffer.view(NUM_BLOCKS, -1) == 0).all(1).nonzero().flatten().tolist()
    assert zeroed == [3, 5]
    runner.scrub([])
    with pytest.raises(IntegrityError, match="blocks 2 to 64 of a cache of 64"):
        runner.scrub([2, NUM_BLOCKS])
    assert (runner.kv_buffer.view(NUM_BLOCKS, -1)[2] == 255).all()


def test_buffer_has_one_extent_for_each_block_and_never_moves(models):
    runner = load_runner(load_checkpoint(models["llama"][1]), dtype="bfloat16", block_size=16, num_blocks=10)
    assert runner.kv_buffer.dtype is torch.uint8
    assert runner.kv_buffer.numel() == 10 * runner.layout.block_bytes
    assert not runner.kv_buffer.any()
    address = runner.kv_buffer.data_ptr()
    runner.execute([ScheduledChunk("r", 0, (1, 2, 3), (9,), True)])
    assert runner.kv_buffer.data_ptr() == address
    written = runner.kv_buffer.view(10, -1).any(1)
    assert written.nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (ScheduledChunk("r", 0, (1,) * 9, (0,), True), "r: 1 blocks for 9 tokens"),
        (ScheduledChunk("r", 0, (1,), (NUM_BLOCKS,), True), "blocks 64 to 64 of a cache of 64"),
        (ScheduledChunk("r", 0, (1,), (-1,), True), "blocks -1 to -1"),
        (ScheduledChunk("r", 0, (96,), (0,), True), "r: a token id outside the vocabulary"),
        (ScheduledChunk("r", 0, (-1,), (0,), True), "r: a token id outside the vocabulary"),
        (ScheduledChunk("r", 0, (), (0,), True), r"r: tokens \[0, 0\)"),
        (ScheduledChunk("r", -1, (1,), (0,), True), r"r: tokens \[-1, 0\)"),
        (ScheduledChunk("r", 512, (1,), tuple(range(64)) * 2, True), r"r: tokens \[512, 513\) of at most 512"),
    ],
)
def test_chunk_that_does_not_fit_is_refused_before_anything_is_computed(models, chunk, message):
    runner = make_runner(models["llama"][1])
    good = ScheduledChunk("good", 0, (1, 2), (5,), True)
    with pytest.raises(IntegrityError, match=message):
        runner.execute([good, chunk])
    assert (runner.kv_buffer == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32, bfloat16"),
        ({"backend": "abacus"}, "backend 'abacus' is not one of torch"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_load_runner_refuses_what_it_does_not_know(models, options, message):
    assert "torch" in BACKENDS
    checkpoint = load_checkpoint(models["llama"][1])
    with pytest.raises(ValueError, match=message):
        load_runner(checkpoint, **({"dtype": "float32", "block_size": 8, "num_blocks": 4} | options))


def test_num_threads_is_set_for_the_process(models):
    before = torch.get_num_threads()
    checkpoint = load_checkpoint(models["llama"][1])
    try:
        load_runner(checkpoint, dtype="float32", block_size=8, num_blocks=4, num_threads=2)
        assert torch.get_num_threads() == 2
        load_runner(checkpoint, dtype="float32", block_size=8, num_blocks=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- the real model ---------------------------------------------------------------------------

CAPITAL_PROMPT = ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return load_checkpoint(smollm2_path)


def greedy(runner, tokens, count):
    sequence = Sequence("r", tokens, count, lambda: 4, [9, 3, 6, 1], runner.layout.block_size)
    run_to_end(runner, [sequence])
    return sequence.output


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_knows_the_capital_of_france(smollm2, smollm2_path, dtype):
    from engine.checkpoint.gguf import read_metadata

    vocabulary = read_metadata(smollm2_path)["tokenizer.ggml.tokens"]
    runner = load_runner(smollm2, dtype=dtype, block_size=16, num_blocks=10)
    runner.kv_buffer.fill_(255)
    output = greedy(runner, [vocabulary.index(token) for token in CAPITAL_PROMPT], 2)
    assert [vocabulary[token] for token in output] == ["ĠParis", "."]
    assert runner.weights_digest == smollm2.weights_digest
    assert len(runner.weights_digest) == 64


@pytest.mark.model
def test_smollm2_float32_logits_are_those_of_transformers(smollm2):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = smollm2.config
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position,
            rope_parameters={"rope_theta": config.rope.theta, "rope_type": "default"},
            tie_word_embeddings=True,
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(dict(smollm2.tensors), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    reference.tie_weights()
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, config.vocab_size, 60)]
    runner = load_runner(smollm2, dtype="float32", block_size=16, num_blocks=10)
    expected = tiny_models.reference_logits(reference, tokens)[-1]
    got = runner.execute([ScheduledChunk("r", 0, tuple(tokens), (9, 1, 8, 2), True)])[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)
    assert got.argmax() == expected.argmax()
