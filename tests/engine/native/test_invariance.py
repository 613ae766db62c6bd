"""A row of logits is the same bits whatever else is computed and however its sequence came to be in the cache.

"Alone" is the sequence's tokens up to the row in one chunk, one thread, blocks in order, nothing else in the step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.native.runner import MAX_ROWS, NativeModelRunner
from engine.scheduler import ScheduledChunk
from tests.engine.native.support import KV_FILL, NativeModel, blocks_of, build_model, random_tokens, same_bits

BLOCK_SIZES = (1, 5, 16, 32, 48, 128)
MAX_LENGTH = 300  # three tiles of keys
NUM_OPERATIONS = 100

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "quant_type": "Q4_1"}),
    "qwen2": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 80}),
    "qwen3": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 32}),
    "mistral": ("mistral", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 96, "quant_type": "Q8_0"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NativeModel]:
    """Builds a model of `SHAPES` once."""
    built: dict[str, NativeModel] = {}

    def get(name: str) -> NativeModel:
        if name not in built:
            family, options = SHAPES[name]
            built[name] = build_model(tmp_path_factory.mktemp("model"), family, **options)
        return built[name]

    return get


class Alone:
    """The rows, and the bytes in the cache, that every other way to compute a sequence must give."""

    def __init__(self, model: NativeModel, instruction_set: str, block_size: int) -> None:
        num_blocks = -(-MAX_LENGTH // block_size)
        self.runner = model.runner(instruction_set, block_size=block_size, num_blocks=num_blocks)
        self._table = tuple(range(num_blocks))
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    def row(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """(V,) after the last token."""
        if tokens not in self._rows:
            self._rows[tokens] = self.runner.execute([ScheduledChunk("alone", 0, tokens, self._table, True)])[0]
        return self._rows[tokens]

    def cache(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """(M, block_bytes): the sequence's blocks, with `KV_FILL` in what was not written."""
        self.runner.kv_buffer.fill_(KV_FILL)
        self.runner.execute([ScheduledChunk("alone", 0, tokens, self._table, False)])
        return blocks_of(self.runner)[: self.runner.layout.num_blocks_for(len(tokens))].clone()


@dataclass
class Sequence:
    """Tokens, and how many of them are in the cache of which runner, in which blocks."""

    tokens: tuple[int, ...]
    runner: NativeModelRunner
    blocks: list[int]
    computed: int = 0

    @property
    def used_blocks(self) -> list[int]:
        return self.blocks[: self.runner.layout.num_blocks_for(self.computed)]


@dataclass
class Walk:
    """Sequences on two runners of one and two threads: computed in chunks, shared, handed over, begun again.

    No block is used twice, so that each holds either its sequence's bytes or `KV_FILL`.
    """

    model: NativeModel
    instruction_set: str
    block_size: int
    seed: int
    sequences: list[Sequence] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.alone = Alone(self.model, self.instruction_set, self.block_size)
        num_blocks = 80 * -(-MAX_LENGTH // self.block_size)
        self.runners = [
            self.model.runner(
                self.instruction_set, block_size=self.block_size, num_blocks=num_blocks, num_threads=num_threads
            )
            for num_threads in (1, 2)
        ]
        self.free = {id(runner): self.random.sample(range(num_blocks), num_blocks) for runner in self.runners}

    def take(self, runner: NativeModelRunner, count: int) -> list[int]:
        return [self.free[id(runner)].pop() for _ in range(count)]

    def add(self) -> None:
        runner = self.random.choice(self.runners)
        length = self.random.choice((1, self.random.randint(2, 40), self.random.randint(2, MAX_LENGTH)))
        tokens = random_tokens(length, self.model.vocab_size, self.random.randrange(1 << 30))
        spare = self.random.randint(0, 2)  # blocks reserved ahead
        self.sequences.append(Sequence(tokens, runner, self.take(runner, runner.layout.num_blocks_for(length) + spare)))

    def hit(self) -> None:
        """A sequence that begins like another, and reads that one's full blocks."""
        candidates = [sequence for sequence in self.sequences if sequence.computed >= self.block_size]
        if not candidates:
            return
        first = self.random.choice(candidates)
        num_shared = self.random.randint(1, first.computed // self.block_size)
        beginning = first.tokens[: num_shared * self.block_size]
        own = random_tokens(self.random.randint(1, 50), self.model.vocab_size, self.random.randrange(1 << 30))
        tokens = (beginning + own)[:MAX_LENGTH]
        if len(tokens) > len(beginning):
            count = first.runner.layout.num_blocks_for(len(tokens)) - num_shared
            blocks = first.blocks[:num_shared] + self.take(first.runner, count)
            self.counts["hit"] += 1
            self.sequences.append(Sequence(tokens, first.runner, blocks, len(beginning)))

    def hand_over(self) -> None:
        """What a handoff does: the blocks' bytes go to other blocks of the other runner."""
        sequence = self.random.choice(self.sequences)
        source = sequence.runner
        target = next(runner for runner in self.runners if runner is not source)
        blocks = self.take(target, len(sequence.blocks))
        blocks_of(target)[blocks] = blocks_of(source)[sequence.blocks]
        sequence.runner, sequence.blocks = target, blocks

    def begin_again(self) -> None:
        """What a preemption does."""
        sequence = self.random.choice(self.sequences)
        sequence.computed = 0
        sequence.blocks = self.take(sequence.runner, len(sequence.blocks))

    def step(self) -> None:
        runner = self.random.choice(self.runners)
        waiting = [s for s in self.sequences if s.runner is runner and s.computed < len(s.tokens)]
        chosen = self.random.sample(waiting, min(len(waiting), self.random.choice((1, 2, 5, 40))))
        chunks = [self.chunk(sequence) for sequence in chosen]
        rows = iter(runner.execute(chunks))
        for sequence, chunk in zip(chosen, chunks, strict=True):
            sequence.computed += len(chunk.token_ids)
            if chunk.samples:
                assert same_bits(next(rows), self.alone.row(sequence.tokens[: sequence.computed]))
                self.counts["row"] += 1
                self.counts["in company" if len(chunks) > 1 else "alone"] += 1
                self.counts["with a past" if chunk.start else "from the start"] += 1

    def chunk(self, sequence: Sequence) -> ScheduledChunk:
        size = self.random.choice((1, 1, self.random.randint(2, 40), self.random.randint(2, MAX_LENGTH)))
        tokens = sequence.tokens[sequence.computed : sequence.computed + size]
        return ScheduledChunk("r", sequence.computed, tokens, tuple(sequence.blocks), self.random.random() < 0.8)

    def run(self) -> None:
        for _ in range(4):
            self.add()
        operations = [self.step] * 8 + [self.add, self.add, self.hit, self.hit, self.hand_over, self.begin_again]
        for _ in range(NUM_OPERATIONS):
            self.random.choice(operations)()
        for sequence in self.sequences:
            if sequence.computed:
                written = blocks_of(sequence.runner)[sequence.used_blocks]
                assert torch.equal(written, self.alone.cache(sequence.tokens[: sequence.computed]))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_random_walk_gives_every_row_and_every_block_the_bits_they_have_alone(
    models, instruction_set, name, block_size
):
    walk = Walk(models(name), instruction_set, block_size, seed=1000 * list(SHAPES).index(name) + block_size)
    walk.run()
    # The walk went where it was meant to go.
    assert walk.counts["row"] > 25
    assert min(walk.counts[kind] for kind in ("alone", "in company", "from the start", "with a past", "hit")) > 0


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_a_sequence_in_any_company_gives_the_same_bits(models, instruction_set, data):
    model = models("llama")
    block_size = data.draw(st.sampled_from(BLOCK_SIZES), label="block size")
    num_threads = data.draw(st.sampled_from((1, 2)), label="threads")
    lengths = data.draw(st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=4), label="lengths")
    cuts = [data.draw(st.sets(st.integers(1, length), max_size=5), label="cuts") for length in lengths]
    num_blocks = sum(-(-length // block_size) for length in lengths)
    free = data.draw(st.randoms(use_true_random=False)).sample(range(num_blocks), num_blocks)
    runner = model.runner(instruction_set, block_size=block_size, num_blocks=num_blocks, num_threads=num_threads)
    alone = Alone(model, instruction_set, block_size)
    under_way = []
    for seed, (length, cut) in enumerate(zip(lengths, cuts, strict=True)):
        tokens = random_tokens(length, model.vocab_size, seed)
        table = tuple(free.pop() for _ in range(-(-length // block_size)))
        edges = pairwise(sorted({0, length} | cut))
        under_way.append([ScheduledChunk(str(seed), a, tokens[a:b], table, True) for a, b in edges])
    while any(under_way):
        chunks = [rest.pop(0) for rest in under_way if rest]
        for chunk, row in zip(chunks, runner.execute(chunks), strict=True):
            seed, end = int(chunk.request_id), chunk.start + len(chunk.token_ids)
            assert same_bits(row, alone.row(random_tokens(lengths[seed], model.vocab_size, seed)[:end]))


@pytest.mark.parametrize("block_size", [5, 16])
def test_what_lies_in_unwritten_slots_does_not_matter(models, instruction_set, block_size):
    model = models("llama")
    prompts = [random_tokens(length, model.vocab_size, length) for length in (1, 2, 15, 16, 17, 129, 250)]
    seen = []
    for fill in (0x00, 0xFF, 0x7F, None):  # None: anything
        runner = model.runner(instruction_set, block_size=block_size, num_blocks=100, fill=fill or 0)
        if fill is None:
            runner.kv_buffer.copy_(torch.randint(0, 256, runner.kv_buffer.shape, dtype=torch.uint8))
        free = list(range(100))
        chunks, decodes = [], []
        for tokens in prompts:
            table = tuple(free.pop() for _ in range(runner.layout.num_blocks_for(len(tokens))))
            chunks.append(ScheduledChunk("r", 0, tokens, table, True))
            decodes.append(ScheduledChunk("r", len(tokens) - 1, tokens[-1:], table, True))
        seen += [runner.execute(chunks), runner.execute(decodes)]
    for rows in seen[1:]:
        assert same_bits(rows, seen[0])


def test_scratch_of_an_earlier_step_does_not_matter(models, instruction_set):
    model = models("qwen2")
    runner = model.runner(instruction_set, block_size=5, num_blocks=80)
    chunk = ScheduledChunk("r", 0, random_tokens(33, model.vocab_size, 1), tuple(range(7)), True)
    fresh = runner.execute([chunk])
    runner.kv_buffer.view(torch.bfloat16)[-100:] = float("nan")
    broken = ScheduledChunk("broken", 200, (1,), tuple(range(39, 80)), True)  # reads blocks that nobody wrote
    assert not runner.execute([broken] * 5).isfinite().any()
    assert same_bits(runner.execute([chunk]), fresh)
    runner.scrub([0, 1])
    assert same_bits(runner.execute([chunk]), fresh)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_step_wider_than_the_kernels_scratch_gives_the_same_bits(models, instruction_set, num_threads):
    model = models("llama")
    tokens = random_tokens(MAX_ROWS + 300, model.vocab_size, 5)
    runner = model.runner(instruction_set, num_blocks=200, num_threads=num_threads)
    table, other = tuple(range(90)), tuple(range(100, 190))
    company = [ScheduledChunk("c", 0, (index,), (190 + index,), True) for index in range(3)]
    *_, wide = runner.execute([*company, ScheduledChunk("wide", 0, tokens, table, True)])
    for start in range(0, len(tokens), 100):
        piece = tokens[start : start + 100]
        narrow = runner.execute([ScheduledChunk("narrow", start, piece, other, True)])[0]
    assert same_bits(wide, narrow)
    assert torch.equal(blocks_of(runner)[list(table[:83])], blocks_of(runner)[list(other[:83])])


def test_the_comparison_is_by_bits():
    nan = torch.full((3,), float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(3), -torch.zeros(3))
    assert not same_bits(torch.ones(3), torch.ones(3).nextafter(nan.nan_to_num(2.0)))
    assert not same_bits(torch.ones(3), torch.ones(2))
