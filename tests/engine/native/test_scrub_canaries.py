"""Scrubbing on the real runners: the named blocks are zero to the last byte, and no byte beside them changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.engine import Engine
from engine.model_runner import ModelRunner, TorchModelRunner
from engine.scheduler import SchedulerConfig
from engine.zone import EPHEMERAL, Zone
from tests.engine.native.support import NativeModel, build_model
from tests.engine.toy_model import CASE, OTHER_CASE, PLAN, FakeClock, make_request, tokens_of, toy_hasher, toy_tokenizer

CANARY, LATE_WRITE = 0xA5, 0x5A
NUM_BLOCKS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return build_model(tmp_path_factory.mktemp("model"), "llama", vocab_size=96)


def torch_runner(model: NativeModel) -> ModelRunner:
    return TorchModelRunner(model.checkpoint, dtype="bfloat16", block_size=16, num_blocks=NUM_BLOCKS)


def native_runner(model: NativeModel) -> ModelRunner:
    return model.runner("portable", num_blocks=NUM_BLOCKS)


class Bench:
    """An engine whose whole cache holds canaries before the first request."""

    def __init__(self, runner: ModelRunner) -> None:
        self.clock = FakeClock()
        self.engine = Engine(
            config=SchedulerConfig(max_model_len=128, local_output_reserve=0),
            runner=runner,
            tokenizer=toy_tokenizer(),
            hasher=toy_hasher(),
            num_blocks=NUM_BLOCKS,
            clock=self.clock,
        )
        runner.kv_buffer.fill_(CANARY)
        self.blocks = runner.kv_buffer.view(NUM_BLOCKS, runner.layout.block_bytes)  # (N, block_bytes)
        self.before = self.blocks.clone()

    def start(self, name: str, zone: Zone, seed: int, num_tokens: int, **fields: bool) -> tuple[int, ...]:
        """Compute the prompt; the blocks that it lies in, the last of them not full."""
        self.engine.add_request(make_request(name, tokens_of(seed, num_tokens), zone, max_tokens=8, **fields))
        self.engine.step()
        block_ids = self.engine.block_ids(name)
        assert not (self.blocks[list(block_ids)] == CANARY).all(1).any(), "a prompt was computed into no block"
        return block_ids

    def remember(self) -> None:
        self.before = self.blocks.clone()

    def assert_only_these_are_zero(self, *block_ids: int) -> None:
        expected = self.before.clone()
        expected[list(block_ids)] = 0
        assert torch.equal(self.blocks, expected)


RUNNERS = [pytest.param(torch_runner, id="torch"), pytest.param(native_runner, id="native")]


@pytest.mark.parametrize("load", RUNNERS)
def test_a_released_case_leaves_no_byte_and_touches_no_neighbour(
    model: NativeModel, load: Callable[[NativeModel], ModelRunner]
) -> None:
    bench = Bench(load(model))
    below = bench.start("below", PLAN, 1, 40)
    case = bench.start("case", CASE, 2, 40)
    above = bench.start("above", OTHER_CASE, 3, 40)
    assert max(below) < min(case) <= max(case) < min(above) < NUM_BLOCKS - 1
    bench.remember()
    bench.engine.abort("case")
    bench.assert_only_these_are_zero(case[-1])  # the tail, which nobody can find
    assert bench.engine.purge(CASE.path, 1).num_scrubbed == 2
    bench.assert_only_these_are_zero(*case)


@pytest.mark.parametrize("load", RUNNERS)
@pytest.mark.parametrize("how", ["ttl", "eviction"])
def test_an_idle_case_that_must_go_leaves_no_byte(
    model: NativeModel, load: Callable[[NativeModel], ModelRunner], how: str
) -> None:
    bench = Bench(load(model))
    case = bench.start("case", CASE, 2, 40)
    above = bench.start("above", PLAN, 3, 40, is_prefill_only=True)
    bench.engine.abort("case")
    bench.remember()
    if how == "ttl":
        bench.clock.now_s += 900.0
        assert bench.engine.expire() == 2
    else:  # the free blocks and the case's are all that a reservation can have; nobody writes to it here
        assert bench.engine.reserve(make_request("r", tokens_of(4, 127), PLAN)) is not None
        assert bench.engine.reserve(make_request("s", tokens_of(5, 75), PLAN)) is not None
        assert bench.engine.stats().evictions == 2
    bench.assert_only_these_are_zero(*case)
    assert (bench.blocks[list(above)] != 0).any(1).all()


@pytest.mark.parametrize("load", RUNNERS)
@pytest.mark.parametrize("zone", [CASE, PLAN, EPHEMERAL])
def test_a_quarantine_ends_with_its_blocks_zero_and_its_neighbours_as_they_were(
    model: NativeModel, load: Callable[[NativeModel], ModelRunner], zone: Zone
) -> None:
    bench = Bench(load(model))
    below = bench.start("below", PLAN, 1, 40)
    reservation = bench.engine.reserve(make_request("r", tokens_of(2, 60), zone, max_tokens=1))
    assert reservation is not None
    above = bench.start("above", OTHER_CASE, 3, 40)
    assert max(below) < min(reservation.block_ids) <= max(reservation.block_ids) < min(above)
    bench.engine.abort("r")
    bench.blocks[list(reservation.block_ids)] = LATE_WRITE  # lands after the abort
    bench.remember()
    assert bench.engine.release_quarantine("r") == len(reservation.block_ids)
    bench.assert_only_these_are_zero(*reservation.block_ids)


@pytest.mark.parametrize("load", RUNNERS)
def test_unpinning_or_purging_a_plan_that_was_kept_scrubs_what_a_purge_must_and_nothing_else(
    model: NativeModel, load: Callable[[NativeModel], ModelRunner]
) -> None:
    bench = Bench(load(model))
    bench.engine.add_request(make_request("warm", tokens_of(1, 48), PLAN, is_prefill_only=True))
    bench.engine.step()
    kept = bench.engine.block_ids("warm")
    assert bench.engine.pin("warm") == 3
    bench.remember()
    assert bench.engine.purge(PLAN.path, 1).num_pinned == 3
    assert bench.engine.pinned() == ()
    bench.assert_only_these_are_zero(*kept[:3])
