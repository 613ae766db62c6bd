"""The engine on a toy model whose every token depends on every byte of KV: tokens equal those of no cache."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest
import torch

from engine.engine import Engine
from engine.errors import GrammarError, IntegrityError, QueueFullError, RequestError, RequestStateError
from engine.request import FinishReason, Request, RequestStatus
from engine.sampler import SampledToken, Sampler
from engine.scheduler import ScheduledChunk, SchedulerConfig
from engine.zone import EPHEMERAL, PUBLIC, Zone, ZoneSpan
from tests.engine.toy_model import (
    CASE,
    EOS,
    OTHER_CASE,
    PLAN,
    RIVAL_CASE,
    VOCAB_SIZE,
    ToyEngine,
    ToyModel,
    ToyRunner,
    first_token,
    make_request,
    send_prompt,
    tokens_of,
    toy_hasher,
    toy_tokenizer,
)

STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR


def expected(prompt: Sequence[int], count: int = 8) -> list[int]:
    return ToyModel.continuation(prompt, count, ignore_eos=True)


def ending_prompt() -> tuple[tuple[int, ...], list[int]]:
    """A prompt whose answer ends by itself, neither at once nor late, and the answer."""
    for seed in range(1000):
        answer = ToyModel.continuation(tokens_of(seed, 9), 40)
        if answer[-1] == EOS and len(answer) > 10:
            return tokens_of(seed, 9), answer
    raise AssertionError("no such prompt")


def text_of(tokens: Sequence[int]) -> str:
    return toy_tokenizer().decode(tokens)


# -- tokens


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 17, 200])
def test_tokens_equal_the_oracles_alone(length: int) -> None:
    engine, prompt = ToyEngine(), tokens_of(1, length)
    engine.run(make_request("a", prompt))
    assert engine.tokens("a") == expected(prompt)
    assert engine.last("a").finish_reason is LENGTH


def test_tokens_equal_the_oracles_in_a_batch() -> None:
    engine = ToyEngine(256)
    prompts = {f"r{index}": tokens_of(index, 3 + 7 * index) for index in range(12)}
    engine.run(*(make_request(name, prompt) for name, prompt in prompts.items()))
    assert {name: engine.tokens(name) for name in prompts} == {
        name: expected(prompt) for name, prompt in prompts.items()
    }


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 16, 64])
def test_tokens_do_not_depend_on_the_chunk_size(chunk: int) -> None:
    engine, prompt = ToyEngine(max_prefill_chunk=chunk), tokens_of(1, 50)
    engine.run(make_request("a", prompt), make_request("b", tokens_of(2, 9)))
    assert engine.tokens("a") == expected(prompt)
    assert max(len(chunk.token_ids) for step in engine.runner.executed for chunk in step) == min(chunk, 50)


@pytest.mark.parametrize("common", [0, 3, 4, 8, 19, 20])
def test_tokens_do_not_depend_on_a_prefix_hit(common: int) -> None:
    engine = ToyEngine()
    first = tokens_of(1, 20)
    second = first[:common] + tokens_of(2, 21 - common)
    engine.run(make_request("a", first))
    engine.run(make_request("b", second))
    assert engine.tokens("b") == expected(second)
    assert engine.last("b").num_cached_tokens == common // 4 * 4
    assert engine.last("b").num_local_prompt_tokens == 21 - common // 4 * 4


def test_a_prompt_that_is_cached_whole_still_gets_its_logits() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 16)
    engine.run(make_request("a", prompt))
    engine.run(make_request("b", prompt))
    assert engine.tokens("b") == engine.tokens("a")
    assert engine.last("b").num_cached_tokens == 12


def test_tokens_do_not_depend_on_preemption() -> None:
    engine = ToyEngine(12, local_output_reserve=0)
    prompts = {name: tokens_of(ord(name), 9) for name in "abcd"}
    engine.run(*(make_request(name, prompt, EPHEMERAL, max_tokens=20) for name, prompt in prompts.items()))
    for name, prompt in prompts.items():
        assert engine.tokens(name) == expected(prompt, 20)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    recomputed = sum(engine.last(name).num_recomputed_tokens for name in prompts)
    assert recomputed == stats.recomputed_tokens
    assert all(engine.last(name).num_local_prompt_tokens == 9 for name in prompts)


def test_another_engine_goes_on_with_a_request_that_one_began() -> None:
    prompt = tokens_of(1, 13)
    engine = ToyEngine()
    engine.run(make_request("a", prompt, output_token_ids=expected(prompt, 5)))
    assert engine.tokens("a") == expected(prompt)[5:]
    assert engine.text("a") == text_of(expected(prompt)[5:])


def test_a_stop_string_is_found_across_the_place_where_another_engine_went_on() -> None:
    prompt, engine = tokens_of(1, 13), ToyEngine()
    answer = expected(prompt)
    text = text_of(answer)
    engine.run(make_request("a", prompt, output_token_ids=answer[:5], stop=(text[4:6],)))
    assert engine.tokens("a") == answer[5:6]
    assert engine.last("a").stop_reason == text[4:6]
    assert engine.text("a") == ""


def test_the_seed_decides_a_sampled_continuation_wherever_it_runs() -> None:
    def sampled(seed: int, begun: Sequence[int] = ()) -> list[int]:
        engine = ToyEngine()
        fields = {"temperature": 1.0, "seed": seed, "output_token_ids": begun}
        engine.run(make_request("a", tokens_of(1, 9), max_tokens=12, **fields))  # type: ignore[arg-type]
        return engine.tokens("a")

    whole = sampled(5)
    assert sampled(5) == whole
    assert sampled(6) != whole
    assert sampled(5, whole[:7]) == whole[7:]


# -- zones


def test_two_requests_of_one_zone_share_blocks_and_two_zones_share_none() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 30)
    engine.run(make_request("a", prompt, CASE))
    engine.run(make_request("b", prompt, CASE))
    assert engine.stats().prefix_cache_hits == 28
    for name, zone in {"c": OTHER_CASE, "d": RIVAL_CASE, "e": PLAN, "f": PUBLIC, "g": EPHEMERAL}.items():
        engine.run(make_request(name, prompt, zone))
    assert engine.stats().prefix_cache_hits == 28
    assert engine.stats().prefix_cache_queries == 7 * 30
    assert all(engine.tokens(name) == expected(prompt) for name in "abcdefg")


def test_requests_that_run_at_the_same_time_share_within_their_zone_only() -> None:
    engine, prompt = ToyEngine(max_prefill_chunk=8), tokens_of(1, 16)
    engine.add_request(make_request("a", prompt, CASE, max_tokens=20))
    engine.step()
    engine.step()
    engine.add_request(make_request("b", prompt, CASE, max_tokens=20))
    engine.add_request(make_request("c", prompt, OTHER_CASE, max_tokens=20))
    engine.step()
    blocks = {name: set(engine.block_ids(name)) for name in "abc"}
    assert len(blocks["a"] & blocks["b"]) == 3
    assert not (blocks["a"] | blocks["b"]) & blocks["c"]
    engine.run()
    assert all(engine.tokens(name) == expected(prompt, 20) for name in "abc")


def test_cases_of_one_plan_share_exactly_the_public_and_the_plan_prefix() -> None:
    engine = ToyEngine()
    template, rubric = tokens_of(1, 10), tokens_of(2, 11)

    def review(name: str, case: Zone, plan: Zone, claim: int) -> Request:
        prompt = template + rubric + tokens_of(claim, 12)
        spans = [ZoneSpan(10, PUBLIC), ZoneSpan(21, plan), ZoneSpan(33, case)]
        return make_request(name, prompt, spans)

    silver = Zone.parse("tenant/acme/plan/silver")
    engine.run(review("a", CASE, PLAN, 3))
    engine.run(review("b", OTHER_CASE, PLAN, 3))
    engine.run(review("c", CASE, PLAN, 3))
    engine.run(review("d", OTHER_CASE, silver, 3))
    engine.run(review("e", CASE, PLAN, 4))
    # Blocks 0-1 are public, 2-4 plan (block 5 reaches into the case).
    hits = {name: engine.last(name).num_cached_tokens for name in "abcde"}
    assert hits == {"a": 0, "b": 20, "c": 32, "d": 8, "e": 20}
    assert engine.tokens("b") == engine.tokens("a") == engine.tokens("c")


def test_a_preempted_request_finds_its_own_blocks_and_no_other_zone_does() -> None:
    engine, prompt = ToyEngine(12, max_num_seqs=1), tokens_of(1, 16)
    engine.add_request(make_request("low", prompt, CASE, priority=1))
    engine.step()
    engine.add_request(make_request("high", prompt, OTHER_CASE))
    engine.run()
    assert engine.stats().preemptions == 1
    assert engine.last("high").num_cached_tokens == 0
    assert engine.last("low").num_recomputed_tokens == 0  # all its computed blocks were full and findable
    assert engine.tokens("low") == engine.tokens("high") == expected(prompt)


def test_private_bytes_are_gone_from_the_cache_when_no_one_may_read_them() -> None:
    engine = ToyEngine(16)
    engine.run(make_request("a", tokens_of(1, 16), EPHEMERAL))
    assert not engine.runner.kv_buffer.any()
    engine.run(make_request("b", tokens_of(1, 16), CASE))
    assert engine.runner.kv_buffer.any()
    engine.clock.now_s += 900.0
    engine.step()
    assert engine.expire() == 0  # the step has done it
    assert not engine.runner.kv_buffer.any()
    assert engine.stats().expired_blocks == 5


def test_scrubbing_spares_the_neighbours() -> None:
    engine = ToyEngine(16)
    engine.run(make_request("a", tokens_of(1, 8), PUBLIC, max_tokens=1))
    canaries = {block_id: engine.runner.block(block_id) for block_id in (0, 1)}
    engine.run(make_request("b", tokens_of(2, 30), EPHEMERAL))
    assert {block_id: engine.runner.block(block_id) for block_id in canaries} == canaries
    assert engine.stats().scrubbed_blocks > 0


def test_a_purge_reaches_idle_blocks_at_once_and_those_in_use_when_they_are_freed() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 16)
    engine.add_request(make_request("a", prompt, CASE))
    engine.step()
    assert engine.purge(CASE.path, 0).num_findable == 4
    engine.run(make_request("b", prompt, CASE, max_tokens=1))
    assert engine.last("b").num_cached_tokens == 0
    engine.run()
    assert engine.tokens("a") == expected(prompt)
    # `b` came after the purge: its blocks are the only ones left.
    assert engine.stats().blocks_cached == 4
    assert engine.purge(CASE.path, 0).num_findable == 4
    assert not engine.runner.kv_buffer.any()


def test_a_request_that_was_waiting_at_the_purge_leaves_nothing_findable() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 16)
    engine.add_request(make_request("a", prompt, CASE))
    engine.purge(CASE.path, 0)
    engine.run()
    assert engine.stats().blocks_cached == 0


def test_a_path_that_is_no_zone_cannot_be_purged() -> None:
    with pytest.raises(RequestError, match="zone path"):
        ToyEngine().purge("tenant/acme", 0)


def test_a_digest_that_forgets_the_zone_stops_the_engine() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 16)
    hasher = toy_hasher()
    engine._cache._hasher.digest = lambda parent, tokens, zone, epoch: hasher.digest(  # type: ignore[method-assign]
        parent, tokens, PUBLIC, 0
    )
    engine.run(make_request("a", prompt, CASE))
    engine.add_request(make_request("b", prompt, OTHER_CASE))
    with pytest.raises(IntegrityError):
        engine.step()


# -- how a request ends


def test_the_end_of_sequence_token_ends_a_request_and_is_no_text() -> None:
    engine, (prompt, answer) = ToyEngine(), ending_prompt()
    engine.run(make_request("a", prompt, max_tokens=100, ignore_eos=False))
    assert engine.tokens("a") == answer
    assert (engine.last("a").finish_reason, engine.last("a").stop_reason) == (STOP, None)
    assert engine.text("a") == text_of(answer[:-1])


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    engine, (prompt, answer) = ToyEngine(), ending_prompt()
    engine.run(make_request("a", prompt, max_tokens=len(answer) + 3))
    assert engine.tokens("a") == expected(prompt, len(answer) + 3)
    assert engine.last("a").finish_reason is LENGTH


def test_a_stop_token_ends_a_request_and_is_named() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    answer = expected(prompt)
    engine.run(make_request("a", prompt, stop_token_ids=(answer[3],)))
    end = answer.index(answer[3]) + 1
    assert engine.tokens("a") == answer[:end]
    assert (engine.last("a").finish_reason, engine.last("a").stop_reason) == (STOP, answer[3])
    assert engine.text("a") == text_of(answer[: end - 1])


def test_a_stop_string_ends_a_request_and_is_cut_from_its_text() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    text = text_of(expected(prompt))
    engine.run(make_request("a", prompt, stop=(text[3:5], "never")))
    assert engine.text("a") == text[: text.index(text[3:5])]
    assert (engine.last("a").finish_reason, engine.last("a").stop_reason) == (STOP, text[3:5])


def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    text = text_of(expected(prompt))
    engine.run(make_request("a", prompt, stop=(text[-2:] + "never",)))
    assert engine.text("a") == text
    assert engine.last("a").text == text[-2:]


def test_min_tokens_bars_the_end() -> None:
    engine, (prompt, answer) = ToyEngine(), ending_prompt()
    count = len(answer) + 5
    engine.run(make_request("a", prompt, max_tokens=100, ignore_eos=False, min_tokens=count))
    assert engine.tokens("a")[: len(answer) - 1] == answer[:-1]
    assert EOS not in engine.tokens("a")[:count]


def test_min_tokens_bars_stop_strings_too() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    text = text_of(expected(prompt))
    engine.run(make_request("a", prompt, stop=(text[1], text[5]), min_tokens=4))
    assert engine.text("a") == text[:5]
    assert engine.last("a").stop_reason == text[5]


def test_a_request_ends_at_the_models_longest_context() -> None:
    engine, prompt = ToyEngine(max_model_len=20), tokens_of(1, 15)
    engine.run(make_request("a", prompt, max_tokens=100))
    assert engine.tokens("a") == expected(prompt, 5)
    assert engine.last("a").finish_reason is LENGTH


def test_a_request_alone_that_outgrows_the_pool_ends_and_does_not_hang() -> None:
    engine, prompt = ToyEngine(4), tokens_of(1, 10)
    engine.run(make_request("a", prompt, max_tokens=100))
    assert engine.tokens("a") == expected(prompt, 7)
    assert engine.last("a").finish_reason is LENGTH
    assert engine.stats().running == 0


def test_logprobs_come_with_each_token_when_asked_for() -> None:
    engine = ToyEngine()
    engine.run(make_request("a", tokens_of(1, 9), logprobs=3), make_request("b", tokens_of(2, 9)))
    [sampled] = engine.outputs["a"][0].logprobs
    assert sampled.token_id == engine.tokens("a")[0]
    assert sampled.logprob is not None
    assert len(sampled.top_logprobs) == 3
    assert engine.outputs["b"][0].logprobs == ()


def test_a_json_schema_constrains_the_answer() -> None:
    engine = ToyEngine(256)
    schema = json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
    schema = schema.replace('"required"', '"additionalProperties": false, "required"')
    engine.run(make_request("a", tokens_of(1, 9), max_tokens=64, ignore_eos=False, json_schema=schema))
    assert json.loads(engine.text("a")).keys() == {"ok"}
    assert engine.last("a").finish_reason is STOP


def test_a_schema_that_does_not_compile_is_refused_without_trace() -> None:
    engine = ToyEngine()
    with pytest.raises(GrammarError):
        engine.add_request(make_request("a", tokens_of(1, 9), json_schema="{"))
    assert not engine.has_work
    engine.check()
    engine.run(make_request("a", tokens_of(1, 9)))


def test_an_error_in_sampling_ends_that_request_and_no_other() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    schema = json.dumps({"const": "abc"})
    broken = make_request("broken", tokens_of(2, 9), json_schema=schema, output_token_ids=[5])
    engine.run(make_request("a", prompt), broken, make_request("b", prompt, CASE))
    assert engine.last("broken").finish_reason is ERROR
    assert engine.last("broken").error
    assert engine.tokens("broken") == []
    assert engine.tokens("a") == engine.tokens("b") == expected(prompt)


# -- what is refused


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    engine = ToyEngine()
    for request in (
        make_request("a", [1, token]),
        make_request("b", [1], output_token_ids=[token]),
    ):
        with pytest.raises(RequestError, match="vocabulary"):
            engine.add_request(request)
    with pytest.raises(RequestError, match="vocabulary"):
        engine.num_cached_prompt_tokens(make_request("a", [1, token, 2, 3, 4]))
    engine.check()


def test_a_full_queue_refuses_without_trace() -> None:
    engine = ToyEngine(max_waiting=1)
    engine.add_request(make_request("a", [1]))
    with pytest.raises(QueueFullError):
        engine.add_request(make_request("b", [1]))
    engine.check()
    engine.run()
    engine.run(make_request("b", [1]))


def test_a_live_id_is_refused_and_its_owner_is_not_disturbed() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    engine.add_request(make_request("a", prompt))
    engine.step()
    for call in (engine.add_request, engine.reserve):
        with pytest.raises(RequestError, match="already"):
            call(make_request("a", prompt))
    engine.run()
    assert engine.tokens("a") == expected(prompt)


def test_a_prompt_that_can_never_fit_is_refused_at_once() -> None:
    engine = ToyEngine(4)
    with pytest.raises(RequestError, match="KV cache"):
        engine.add_request(make_request("a", tokens_of(1, 17)))
    engine.check()


def test_an_engine_wants_no_more_blocks_than_its_runner_has() -> None:
    with pytest.raises(ValueError, match="4 blocks"):
        Engine(
            config=SchedulerConfig(),
            runner=ToyRunner(4),
            tokenizer=toy_tokenizer(),
            hasher=toy_hasher(),
            num_blocks=5,
        )


# -- abort and faults


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_an_abort_at_any_time_frees_everything_and_is_idempotent(steps: int) -> None:
    engine, prompt = ToyEngine(max_prefill_chunk=8), tokens_of(1, 30)
    engine.add_request(make_request("a", prompt, EPHEMERAL))
    engine.add_request(make_request("b", tokens_of(2, 9)))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("never seen")
    engine.run()
    assert engine.tokens("b") == expected(tokens_of(2, 9))
    assert engine.stats().blocks_used == 0
    assert "a" not in engine._detokenizers


def test_an_aborted_id_may_be_used_again_at_once() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 9)
    engine.add_request(make_request("a", tokens_of(2, 9)))
    engine.step()
    engine.abort("a")
    engine.outputs.clear()
    engine.run(make_request("a", prompt))
    assert engine.tokens("a") == expected(prompt)


def test_a_step_that_the_runner_fails_can_be_repeated() -> None:
    engine, prompt = ToyEngine(max_prefill_chunk=4), tokens_of(1, 9)
    engine.add_request(make_request("a", prompt))
    for _ in range(8):
        engine.runner.fault = RuntimeError("device lost")
        with pytest.raises(RuntimeError, match="device lost"):
            engine.step()
        engine.check()
        engine.step()
    engine.run()
    assert engine.tokens("a") == expected(prompt)


def test_an_idle_step_does_nothing() -> None:
    engine = ToyEngine()
    assert engine.step() == []
    assert engine.runner.executed == []
    assert engine.stats().steps == 0


# -- peeking


def test_a_peek_at_the_prefix_cache_foretells_the_hit_and_changes_nothing() -> None:
    engine, prompt = ToyEngine(), tokens_of(1, 30)
    engine.run(make_request("a", prompt, CASE))
    before = engine.stats()
    assert engine.num_cached_prompt_tokens(make_request("x", prompt, CASE)) == 28
    assert engine.num_cached_prompt_tokens(make_request("x", prompt, OTHER_CASE)) == 0
    assert engine.stats() == before
    late = make_request("b", prompt, CASE)
    assert engine.num_cached_prompt_tokens(late) == 28
    engine.run(late)
    assert engine.last("b").num_cached_tokens == 28


# -- handoff: the side that computes the prompt


def test_a_prefill_only_request_samples_one_token_and_holds_its_blocks() -> None:
    engine, prompt = ToyEngine(max_prefill_chunk=8), tokens_of(1, 20)
    engine.add_request(make_request("p", prompt, CASE, is_prefill_only=True, max_tokens=50))
    engine.step()
    blocks = engine.block_ids("p")
    assert len(blocks) == 5  # all of the prompt's, from the first chunk on
    engine.run()
    assert engine.block_ids("p") == blocks
    assert [output.num_computed_tokens for output in engine.outputs["p"]] == [8, 16, 20]
    assert [output.token_ids for output in engine.outputs["p"]] == [(), (), tuple(expected(prompt, 1))]
    assert engine.last("p").finish_reason is LENGTH
    assert (engine.stats().held, engine.stats().blocks_used) == (1, 5)
    engine.release("p")
    engine.release("p")
    assert (engine.stats().held, engine.stats().blocks_used, engine.stats().blocks_cached) == (0, 0, 5)
    engine.check()


def test_an_aborted_prefill_only_request_holds_its_blocks_until_they_are_released() -> None:
    engine = ToyEngine(max_prefill_chunk=8)
    engine.add_request(make_request("p", tokens_of(1, 20), EPHEMERAL, is_prefill_only=True))
    engine.step()
    blocks = engine.block_ids("p")
    engine.abort("p")
    engine.abort("p")
    engine.run(make_request("other", tokens_of(2, 60)))
    assert engine.block_ids("p") == blocks
    assert not {block for step in engine.runner.executed[1:] for chunk in step for block in chunk.block_ids} & set(
        blocks
    )
    engine.release("p")
    assert engine.stats().blocks_used == 0
    engine.check()


def test_a_prefill_only_request_that_never_started_needs_no_release() -> None:
    engine = ToyEngine()
    engine.add_request(make_request("p", tokens_of(1, 20), is_prefill_only=True))
    engine.abort("p")
    engine.release("p")
    with pytest.raises(RequestStateError):
        engine.block_ids("p")
    engine.check()


def test_a_prefill_only_request_whose_sampling_fails_still_holds_its_blocks() -> None:
    engine = ToyEngine()
    request = make_request("p", tokens_of(1, 9), is_prefill_only=True, json_schema='{"const": "abc"}')
    engine.add_request(request)
    engine._sampler.accept(request, 5)  # as if its grammar had broken
    engine.run()
    assert engine.last("p").finish_reason is ERROR
    assert engine.stats().held == 1
    engine.release("p")
    engine.check()


def test_a_prefill_only_request_that_is_being_computed_cannot_be_released() -> None:
    engine = ToyEngine(max_prefill_chunk=4)
    engine.add_request(make_request("p", tokens_of(1, 9), is_prefill_only=True))
    engine.step()
    with pytest.raises(RequestStateError):
        engine.release("p")


# -- sampling beside the forward pass


class WaitingRunner(ToyRunner):
    """Comes back from `execute` once every mask of the step is ready, and never if nobody computes it meanwhile."""

    sampler: Sampler

    def execute(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        logits = super().execute(chunks)
        deadline = time.monotonic() + 10.0
        while not all(state.grammar.has_mask for state in self.sampler._states.values() if state.grammar is not None):
            assert time.monotonic() < deadline, "the mask is not computed beside the forward pass"
            time.sleep(0.0001)
        return logits


def test_the_masks_of_a_step_are_computed_while_the_model_works() -> None:
    engine = ToyEngine()
    engine._runner = engine.runner = runner = WaitingRunner(64)
    runner.sampler = engine._sampler
    requests = [make_request(name, tokens_of(ord(name), 9), json_schema='{"enum": ["ab", "cd"]}') for name in "abc"]
    engine.run(*requests, make_request("free", tokens_of(9, 9)), max_steps=50)
    for request in requests:
        assert json.loads(engine.text(request.request_id)[:4]) in ("ab", "cd")
    num_tokens = sum(len(engine.tokens(request.request_id)) for request in requests)
    assert (engine._sampler.num_masks_ahead, engine._sampler.num_masks_on_demand) == (num_tokens, 0)
    engine.close()
    engine.close()


def test_a_step_that_fails_leaves_its_masks_to_the_next_one_or_to_an_abort() -> None:
    engine = ToyEngine()
    for name in "ab":
        engine.add_request(make_request(name, tokens_of(ord(name), 9), json_schema='{"const": 7}', ignore_eos=False))
    engine.runner.fault = RuntimeError("no memory")
    with pytest.raises(RuntimeError):
        engine.step()
    engine.abort("a")
    engine.run()
    assert engine.text("b") == "7"
    assert engine._sampler.num_masks_on_demand == 0


# -- handoff: the side where the KV lands


class Pair:
    """A prefill engine and a decode engine, and the steps of a handoff between them."""

    def __init__(self, **config: int) -> None:
        self.prefill = ToyEngine(64, max_prefill_chunk=8)
        self.decode = ToyEngine(64, **config)

    def reserve(self, prompt: Sequence[int], zone: Zone = CASE, **fields: object) -> None:
        reservation = self.decode.reserve(make_request("r", prompt, zone, **fields))  # type: ignore[arg-type]
        assert reservation is not None
        self.reservation = reservation
        self.prefill.run(make_request("r", prompt, zone, is_prefill_only=True))

    def accept(self) -> None:
        self.decode.keep([self.decode.accept_first_token("r", first_token(self.prefill, "r"))])

    def land(self) -> None:
        send_prompt(self.prefill, self.decode, self.reservation, "r")
        self.decode.complete_handoff("r")
        self.prefill.release("r")


@pytest.mark.parametrize("length", [1, 4, 5, 30])
def test_a_handoff_gives_the_tokens_of_one_engine_and_computes_no_prompt_token_here(length: int) -> None:
    pair, prompt = Pair(), tokens_of(1, length)
    pair.reserve(prompt)
    pair.accept()
    assert not pair.decode.has_work
    pair.land()
    pair.decode.run()
    assert pair.decode.tokens("r") == expected(prompt)
    last = pair.decode.last("r")
    assert (last.num_local_prompt_tokens, last.num_recomputed_tokens, last.num_cached_tokens) == (0, 0, 0)
    assert pair.decode.text("r") == text_of(expected(prompt))
    assert pair.decode.stats().computed_tokens == 7


def test_only_blocks_that_are_missing_are_asked_for() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.decode.run(make_request("earlier", prompt[:18], CASE, max_tokens=1))
    pair.reserve(prompt)
    assert pair.reservation.first_missing_block == 4
    assert pair.reservation.num_cached_tokens == 16
    assert len(pair.reservation.block_ids) == 4  # of eight; none for the output
    assert pair.decode.generations(pair.reservation.block_ids) == pair.reservation.generations
    shared = pair.decode.block_ids("r")[:4]
    assert not set(shared) & set(pair.reservation.block_ids)
    pair.accept()
    pair.land()
    pair.decode.run()
    assert pair.decode.tokens("r") == expected(prompt)


def test_landed_blocks_are_found_by_the_next_request_of_the_case_only() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.reserve(prompt)
    pair.accept()
    assert pair.decode.num_cached_prompt_tokens(make_request("x", prompt, CASE)) == 0
    pair.land()
    assert pair.decode.num_cached_prompt_tokens(make_request("x", prompt, CASE)) == 28
    assert pair.decode.num_cached_prompt_tokens(make_request("x", prompt, OTHER_CASE)) == 0


def test_a_first_token_that_ends_the_request_leaves_its_blocks_in_quarantine() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.reserve(prompt, max_tokens=1)
    pair.accept()
    assert pair.decode.last("r").finish_reason is LENGTH
    assert pair.decode.stats().blocks_quarantined == 8
    with pytest.raises(RequestStateError):
        pair.decode.complete_handoff("r")
    assert pair.decode.release_quarantine("r") == 8
    assert pair.decode.release_quarantine("r") == 0
    assert pair.decode.stats().blocks_free == 64
    pair.decode.check()


def test_an_abort_while_the_kv_is_on_its_way_keeps_its_blocks_from_everybody() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.reserve(prompt)
    pair.decode.abort("r")
    pair.decode.abort("r")
    pair.decode.run(make_request("other", tokens_of(2, 150), EPHEMERAL))
    # The write lands late, into blocks that are nobody's.
    send_prompt(pair.prefill, pair.decode, pair.reservation, "r")
    pair.decode.run(make_request("more", tokens_of(3, 150), EPHEMERAL))
    assert pair.decode.tokens("more") == expected(tokens_of(3, 150))
    assert pair.decode.release_quarantine("r") == 8
    assert not pair.decode.runner.kv_buffer.any()


def test_a_reserved_block_has_a_new_generation_after_its_quarantine() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.reserve(prompt)
    pair.decode.abort("r")
    pair.decode.release_quarantine("r")
    again = pair.decode.reserve(make_request("s", prompt, CASE))
    assert again is not None
    assert again.block_ids == pair.reservation.block_ids
    assert all(new > old for new, old in zip(again.generations, pair.reservation.generations, strict=True))
    assert pair.decode.generations(pair.reservation.block_ids) != pair.reservation.generations


@pytest.mark.parametrize("accepted", [False, True])
def test_a_failed_handoff_is_computed_here_and_emits_no_token_twice(accepted: bool) -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.reserve(prompt)
    if accepted:
        pair.accept()
    pair.decode.prefill_locally("r")
    pair.decode.step()
    send_prompt(pair.prefill, pair.decode, pair.reservation, "r")  # lands late
    pair.decode.run()
    assert pair.decode.tokens("r") == expected(prompt)
    assert pair.decode.text("r") == text_of(expected(prompt))
    last = pair.decode.last("r")
    assert (last.num_local_prompt_tokens, last.num_recomputed_tokens) == (30, 30)
    assert pair.decode.stats().blocks_quarantined == 8
    assert pair.decode.release_quarantine("r") == 8
    pair.decode.check()


def test_a_fall_back_counts_its_prompt_by_where_it_came_from_in_the_end() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.decode.run(make_request("earlier", prompt[:18], CASE, max_tokens=1))
    pair.reserve(prompt)
    assert pair.reservation.num_cached_tokens == 16
    pair.decode.prefill_locally("r")
    pair.decode.purge(CASE.path, 0)
    pair.decode.run()
    last = pair.decode.last("r")
    assert (last.num_cached_tokens, last.num_local_prompt_tokens) == (0, 30)


def test_a_landed_request_that_is_preempted_is_computed_again_here() -> None:
    pair, prompt = Pair(max_num_seqs=1), tokens_of(1, 30)
    pair.reserve(prompt, EPHEMERAL, priority=1)
    pair.accept()
    pair.land()
    pair.decode.step()
    pair.decode.run(make_request("high", tokens_of(2, 9)))
    assert pair.decode.stats().preemptions == 1
    assert pair.decode.tokens("r") == expected(prompt)
    assert pair.decode.last("r").num_recomputed_tokens == 31
    assert pair.decode.last("r").num_local_prompt_tokens == 0


def test_a_landed_request_that_is_preempted_before_its_first_step_is_not_counted_as_local() -> None:
    pair, prompt = Pair(max_num_seqs=1), tokens_of(1, 30)
    pair.reserve(prompt, EPHEMERAL, priority=1)
    pair.accept()
    pair.land()
    pair.decode.run(make_request("high", tokens_of(2, 9)))
    assert pair.decode.tokens("r") == expected(prompt)
    assert pair.decode.last("r").num_recomputed_tokens == 30
    assert pair.decode.last("r").num_local_prompt_tokens == 0


def test_a_handoff_cannot_complete_without_its_first_token() -> None:
    pair = Pair()
    pair.reserve(tokens_of(1, 9))
    with pytest.raises(RequestStateError, match="first token"):
        pair.decode.complete_handoff("r")


def test_a_second_first_token_is_refused() -> None:
    pair = Pair()
    pair.reserve(tokens_of(1, 9))
    pair.accept()
    with pytest.raises(RequestStateError, match="already"):
        pair.accept()
    assert len(pair.decode.tokens("r")) == 1


def test_a_first_token_outside_the_vocabulary_is_refused() -> None:
    pair = Pair()
    pair.reserve(tokens_of(1, 9))
    with pytest.raises(RequestError, match="vocabulary"):
        pair.decode.accept_first_token("r", SampledToken(VOCAB_SIZE))


@pytest.mark.parametrize("call", ["complete_handoff", "prefill_locally"])
def test_a_call_for_a_reservation_that_is_gone_is_refused(call: str) -> None:
    engine = ToyEngine()
    with pytest.raises(RequestStateError, match="no reservation"):
        getattr(engine, call)("r")
    with pytest.raises(RequestStateError, match="no reservation"):
        engine.accept_first_token("r", SampledToken(1))


def test_a_reservation_without_room_leaves_no_trace() -> None:
    engine = ToyEngine(8)
    assert engine.reserve(make_request("a", tokens_of(1, 20), CASE)) is not None
    late = make_request("b", tokens_of(2, 20), CASE)
    assert engine.reserve(late) is None
    assert late.status is RequestStatus.WAITING
    engine.check()
    engine.abort("a")
    engine.release_quarantine("a")
    assert engine.reserve(late) is not None


def test_a_reservation_purged_in_flight_lands_but_is_not_found() -> None:
    pair, prompt = Pair(), tokens_of(1, 30)
    pair.reserve(prompt)
    pair.accept()
    pair.decode.purge(CASE.path, 0)
    pair.land()
    assert pair.decode.num_cached_prompt_tokens(make_request("x", prompt, CASE)) == 0
    pair.decode.run()
    assert pair.decode.tokens("r") == expected(prompt)
    assert pair.decode.stats().blocks_cached == 0
