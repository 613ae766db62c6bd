"""What `load_runner` gives where the native backend was asked for: it, or torch with a named reason."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.errors import IntegrityError
from engine.model_runner import load_runner
from engine.native import runner as native_runner
from engine.native.mapping import HUGE_PAGE_BYTES
from engine.native.runner import MAX_ROWS
from engine.scheduler import ScheduledChunk
from tests.engine import tiny_models

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

COVERED = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 4096}
PROMPT = tuple(range(5, 42))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model whose shapes the kernels cover, one whose hidden_size they do not, and the directories of both."""
    root = tmp_path_factory.mktemp("models")
    built = {"covered": tiny_models.build("llama", **COVERED), "narrow": tiny_models.build("llama")}
    return {name: (model, tiny_models.save(model, root / name)) for name, model in built.items()}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """One for the module: the kernels are compiled once."""
    return tmp_path_factory.mktemp("cache")


def load(path, cache_dir, **options):
    defaults = {"dtype": "bfloat16", "block_size": 16, "num_blocks": 8, "backend": "native", "cache_dir": cache_dir}
    return load_runner(load_checkpoint(path), **(defaults | options))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def greedy(runner, prompt, count):
    blocks = tuple(reversed(range(runner.num_blocks)))
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + count:
        logits = runner.execute([ScheduledChunk("r", start, tuple(tokens[start:]), blocks, True)])
        start = len(tokens)
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


def assert_torch_serves(runner, reason, caplog, path):
    """With one line in the log, and the tokens that it gives when it is asked for itself."""
    assert runner.arithmetic.startswith("torch-")
    assert reason in runner.fallback_reason
    (line,) = warnings_of(caplog)
    assert line == f"the torch backend runs instead of the native one: {runner.fallback_reason}"
    plain = load_runner(load_checkpoint(path), dtype=runner.layout.dtype, block_size=16, num_blocks=8)
    assert greedy(runner, PROMPT, 8) == greedy(plain, PROMPT, 8)


def test_torch_is_what_runs_unless_asked_otherwise(models, caplog):
    runner = load_runner(load_checkpoint(models["covered"][1]), dtype="bfloat16", block_size=16, num_blocks=8)
    assert runner.arithmetic == "torch-bfloat16-cpu"
    assert runner.fallback_reason is None
    assert runner.layout.slab_order == "rows"
    assert warnings_of(caplog) == []


def test_model_that_the_kernels_do_not_cover_runs_on_torch(models, cache_dir, caplog):
    path = models["narrow"][1]
    assert_torch_serves(load(path, cache_dir), "hidden_size 48 is not a multiple of 32", caplog, path)


def test_float32_runs_on_torch(models, cache_dir, caplog):
    path = models["covered"][1]
    runner = load(path, cache_dir, dtype="float32")
    assert_torch_serves(runner, "its KV cache is bfloat16, not float32", caplog, path)
    assert greedy(runner, PROMPT, 8) == tiny_models.reference_greedy(models["covered"][0], PROMPT, 8)


def test_machine_without_a_compiler_runs_on_torch(models, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = models["covered"][1]
    assert_torch_serves(load(path, tmp_path / "cache"), "no g++ on the PATH", caplog, path)


def test_compiler_that_fails_leaves_torch(models, tmp_path, caplog, monkeypatch):
    script = tmp_path / "g++"
    script.write_text('#!/bin/sh\necho "engine.cpp:1:1: error: no such instruction" >&2; exit 1')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = models["covered"][1]
    runner = load(path, tmp_path / "cache")
    assert_torch_serves(runner, "its kernels do not compile: engine.cpp:1:1: error: no such instruction", caplog, path)


@needs_compiler
def test_weights_of_two_kinds_side_by_side_run_on_torch(models, cache_dir, tmp_path, caplog):
    model = models["covered"][0]
    path = tiny_models.write_gguf(
        model, tmp_path / "mixed.gguf", quant_type=lambda name: "Q4_1" if name == "blk.0.ffn_up.weight" else "Q8_0"
    )
    runner = load(path, cache_dir)
    assert runner.arithmetic == "torch-bfloat16-cpu"
    assert "gate_proj.weight has 8-bit weights and " in runner.fallback_reason
    assert len(warnings_of(caplog)) == 1


@needs_compiler
def test_platform_without_the_kernels_runs_on_torch(models, cache_dir, caplog, monkeypatch):
    monkeypatch.setattr(native_runner.sys, "platform", "plan9")
    path = models["covered"][1]
    assert_torch_serves(load(path, cache_dir), "it runs on Linux alone", caplog, path)


@pytest.mark.parametrize("options", [{"instruction_set": "mmx"}, {"block_size": 0}, {"num_blocks": 0}])
def test_nonsense_is_refused_and_not_hidden_by_a_fallback(options, models, cache_dir):
    with pytest.raises(ValueError, match=r"mmx|block_size|num_blocks"):
        load(models["covered"][1], cache_dir, **options)


# --- where it runs ----------------------------------------------------------------------------


@pytest.fixture
def native(models, cache_dir):
    """A native runner with room for two steps' worth of tokens."""
    runner = load(models["covered"][1], cache_dir, num_blocks=160)
    assert runner.fallback_reason is None
    return runner


@needs_compiler
def test_native_runner_says_what_it_computes_with(native, models, cache_dir, caplog):
    assert native.arithmetic in ("native-avx512", "native-avx2", "native-portable")
    assert load(models["covered"][1], cache_dir, instruction_set="portable").arithmetic == "native-portable"
    assert warnings_of(caplog) == []
    assert native.weights_digest == load_checkpoint(models["covered"][1]).weights_digest


@needs_compiler
@pytest.mark.parametrize(("block_size", "order"), [(16, "pairs"), (48, "pairs"), (8, "rows"), (1, "rows")])
def test_slab_order_follows_the_block_size(block_size, order, models, cache_dir):
    assert load(models["covered"][1], cache_dir, block_size=block_size).layout.slab_order == order


@needs_compiler
def test_logits_are_near_those_of_transformers(native, models):
    logits = native.execute([ScheduledChunk("r", 0, PROMPT, (3, 1, 2), True)])
    assert logits.shape == (1, 96)
    assert logits.dtype is torch.float32
    expected = tiny_models.reference_logits(models["covered"][0], PROMPT)[-1]
    assert torch.cosine_similarity(logits[0], expected, 0) > 0.99


@needs_compiler
def test_cache_is_one_aligned_extent_that_never_moves(native):
    assert native.kv_buffer.dtype is torch.uint8
    assert native.kv_buffer.shape == (160 * native.layout.block_bytes,)
    assert native.kv_buffer.data_ptr() % HUGE_PAGE_BYTES == 0
    assert not native.kv_buffer.any()
    address = native.kv_buffer.data_ptr()
    native.execute([ScheduledChunk("r", 0, (1, 2, 3), (9,), True)])
    assert native.kv_buffer.data_ptr() == address
    assert native.kv_buffer.view(160, -1).any(1).nonzero().flatten().tolist() == [9]
    native.scrub([9, 4])
    assert not native.kv_buffer.any()
    with pytest.raises(IntegrityError, match="blocks 2 to 160 of a cache of 160"):
        native.scrub([2, 160])


@needs_compiler
def test_step_wider_than_the_kernels_take_is_cut_without_a_trace(native):
    tokens = tuple(index * 7 % 96 for index in range(MAX_ROWS + 500))
    long = tuple(range(100))
    steps = [
        [ScheduledChunk("a", 0, tokens[:700], long[:44], True), ScheduledChunk("b", 0, tokens[:9], (150,), True)],
        [
            ScheduledChunk("c", 0, tokens[:300], tuple(range(100, 119)), False),
            ScheduledChunk("a", 700, tokens[700:], long, True),
            ScheduledChunk("d", 0, tokens[:1], (151,), False),
            ScheduledChunk("e", 0, tokens[:2], (152,), True),
        ],
    ]
    wide = [*steps[0][1:], ScheduledChunk("whole", 0, tokens, long, True), *steps[1][:1], *steps[1][2:]]
    narrow = [native.execute(step) for step in steps]
    kept = native.kv_buffer.clone()
    native.kv_buffer.fill_(255)
    logits = native.execute(wide)
    assert torch.equal(logits, torch.stack((narrow[0][1], narrow[1][0], narrow[1][1])))
    written = kept.view(160, -1).any(1)
    assert int(written.sum()) == 96 + 19 + 3
    # Every slot of a full block was written again; where a block is not full, 255 stays in the rest.
    full = [*range(95), *range(100, 118)]
    assert torch.equal(kept.view(160, -1)[full], native.kv_buffer.view(160, -1)[full])


@needs_compiler
def test_chunks_that_do_not_sample_have_no_row(native):
    chunk = ScheduledChunk("r", 0, (1, 2, 3), (9,), False)
    assert native.execute([chunk]).shape == (0, 96)
    assert native.execute([]).shape == (0, 96)


@needs_compiler
@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (ScheduledChunk("r", 0, (1,) * 17, (0,), True), "r: 1 blocks for 17 tokens"),
        (ScheduledChunk("r", 0, (1,), (160,), True), "blocks 160 to 160 of a cache of 160"),
        (ScheduledChunk("r", 0, (1,), (-1,), True), "blocks -1 to -1"),
        (ScheduledChunk("r", 0, (96,), (0,), True), "r: a token id outside the vocabulary"),
        (ScheduledChunk("r", 0, (2**40,), (0,), True), "r: a token id outside the vocabulary"),
        (ScheduledChunk("r", 0, (), (0,), True), r"r: tokens \[0, 0\)"),
        (ScheduledChunk("r", -1, (1,), (0,), True), r"r: tokens \[-1, 0\)"),
    ],
)
def test_chunk_that_does_not_fit_is_refused_before_anything_is_computed(native, chunk, message):
    good = ScheduledChunk("good", 0, (1, 2), (5,), True)
    with pytest.raises(IntegrityError, match=message):
        native.execute([good, chunk])
    assert not native.kv_buffer.any()


@needs_compiler
def test_logits_of_one_step_are_not_those_of_the_next(native):
    first = native.execute([ScheduledChunk("r", 0, (1, 2, 3), (9,), True)])
    kept = first.clone()
    native.execute([ScheduledChunk("q", 0, (7, 8), (3,), True)])
    assert torch.equal(first, kept)


@needs_compiler
def test_closed_runner_computes_nothing_and_its_cache_stays_readable(native):
    chunk = ScheduledChunk("r", 0, (1, 2, 3), (9,), True)
    native.execute([chunk])
    assert native.scratch_bytes > 0
    native.close()
    native.close()
    with pytest.raises(RuntimeError, match="the runner is closed"):
        native.execute([chunk])
    with pytest.raises(RuntimeError, match="the runner is closed"):
        native.scrub([9])
    assert native.kv_buffer.any()


@needs_compiler
def test_cache_outlives_its_runner(models, cache_dir):
    runner = load(models["covered"][1], cache_dir)
    runner.execute([ScheduledChunk("r", 0, (1, 2, 3), (2,), True)])
    buffer = runner.kv_buffer
    del runner
    assert buffer.view(8, -1).any(1).nonzero().flatten().tolist() == [2]
