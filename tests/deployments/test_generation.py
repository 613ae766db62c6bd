"""Generation at the edge: admission, several choices, the timeline and the counters, and what stays open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError

from deployments.client import DecodeClient
from deployments.errors import BadRequest, InternalFault, NoCapacity, OverCapacity, ReplicaLost
from deployments.generation import GenerationService, Timeline, TokenisedPrompt
from deployments.http import event_stream, with_first
from deployments.messages import GenerateCall, TokenEvent
from deployments.metrics import PREFIX, IngressMetrics
from deployments.trust.epochs import EpochStore
from deployments.trust.labelling import unlabelled
from deployments.trust.zone_grant import GrantRefused, GrantSealer, GrantVerifier
from engine.request import SamplingParams
from engine.zone import PUBLIC, Zone, ZoneSpan
from tests.deployments.support import GRANT_KEY, Clock, Handle, Hold, Script, last, local_config, run, settle, token

PROMPT = TokenisedPrompt((1, 2, 3), unlabelled(3))
PLAN = Zone.parse("tenant/t/plan/p")
CASE = Zone.parse("tenant/t/case/c")


class Service:
    """A service over a scripted handle: choice i plays `scripts[i]`."""

    def __init__(
        self,
        *scripts: Script,
        max_inflight: int = 8,
        clock: Clock | None = None,
        epochs: EpochStore | None = None,
    ) -> None:
        self.handle = Handle(list(scripts))
        self.metrics = IngressMetrics()
        self.clock = clock or Clock()
        config = local_config(routing={"max_inflight_requests": max_inflight}, model={"max_model_len": 100})
        self.service = GenerationService(
            client=DecodeClient(self.handle, config.routing, self.metrics),
            config=config,
            affinity_key=b"k" * 32,
            grants=GrantSealer((GRANT_KEY,)),
            metrics=self.metrics,
            epochs=epochs,
            clock=self.clock,
        )

    def stream(self, num_choices: int = 1) -> AsyncGenerator[tuple[int, TokenEvent, Timeline], None]:
        choices = [SamplingParams(max_tokens=4, seed=100 + index) for index in range(num_choices)]
        return self.service.stream(PROMPT, choices, arrival=0.0)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(PREFIX + name, labels)

    def check_idle(self) -> None:
        assert self.service.num_inflight == 0
        self.handle.check_left_clean()


def endless(num_choices: int) -> list[Script]:
    """Choices that give two tokens and then wait."""
    return [[token(1), token(2), Hold()] for _ in range(num_choices)]


async def collect(events: AsyncGenerator[Any, None]) -> list[Any]:
    return [item async for item in events]


class TestOneChoice:
    def test_events_pass_through_with_index_nought(self) -> None:
        async def body() -> None:
            service = Service([token(1), token(2), last(3)])
            items = await collect(service.stream())
            assert [(index, event) for index, event, _ in items] == [(0, token(1)), (0, token(2)), (0, last(3))]
            service.check_idle()

        run(body)

    def test_whole_answer_is_put_together(self) -> None:
        async def body() -> None:
            service = Service([token(1), token(2), last(3, "length", decode_cache=2, prefill_computed=1)])
            (result,) = await service.service.complete(PROMPT, [SamplingParams()], arrival=0.0)
            assert (result.text, result.token_ids, result.finish_reason) == ("<1><2><3>", [1, 2, 3], "length")
            assert result.provenance.origins == {"decode_cache": 2, "prefill_computed": 1}
            assert len(result.events) == 3
            service.check_idle()

        run(body)

    def test_call_carries_prompt_zones_and_limits(self) -> None:
        async def body() -> None:
            service = Service([last(1)])
            await collect(service.stream())
            (call,) = service.handle.calls
            assert call.prompt_token_ids == PROMPT.token_ids
            assert call.zone_spans == PROMPT.zone_spans
            assert call.sampling.seed == 100
            assert call.timeout_s == 300

        run(body)

    def test_call_is_sealed_with_the_epochs_of_now_and_the_tenant(self) -> None:
        async def body() -> None:
            epochs = EpochStore(None)
            service = Service([last(1)], [last(1)], epochs=epochs)
            prompt = TokenisedPrompt((1, 2, 3), (ZoneSpan(1, PUBLIC), ZoneSpan(2, PLAN), ZoneSpan(3, CASE)))
            verifier = GrantVerifier((GRANT_KEY,))
            for purged in ((), (CASE, CASE, PLAN)):
                for zone in purged:
                    epochs.raise_epoch(zone)
                await collect(service.service.stream(prompt, [SamplingParams()], arrival=0.0, tenant="t"))
                verifier.verify(service.handle.calls[-1])
            first, second = service.handle.calls
            assert [span.epoch for span in first.zone_spans] == [0, 0, 0]
            assert (first.epoch, first.tenant) == (0, "t")
            assert [span.epoch for span in second.zone_spans] == [0, 1, 2]
            assert second.epoch == 2

        run(body)

    def test_each_choice_has_a_grant_of_its_own(self) -> None:
        async def body() -> None:
            service = Service([last(1)], [last(2)])
            await collect(service.stream(2))
            one, other = service.handle.calls
            verifier = GrantVerifier((GRANT_KEY,))
            verifier.verify(one)
            verifier.verify(other)
            with pytest.raises(GrantRefused):
                verifier.verify(replace(one, grant=other.grant))

        run(body)

    def test_zone_of_another_tenant_is_never_sealed(self) -> None:
        async def body() -> None:
            service = Service([last(1)])
            prompt = TokenisedPrompt((1, 2, 3), (ZoneSpan(3, CASE),))
            with pytest.raises(ValueError, match="another tenant"):
                await collect(service.service.stream(prompt, [SamplingParams()], arrival=0.0, tenant="u"))
            assert service.handle.calls == []
            service.check_idle()

        run(body)

    def test_calls_after_a_rotation_have_grants_and_affinity_of_the_new_keys(self) -> None:
        async def body() -> None:
            service = Service([last(1)], [last(1)])
            prompt = TokenisedPrompt((1, 2, 3), (ZoneSpan(3, CASE),))
            new_key = b"n" * 32
            for _ in range(2):
                await collect(service.service.stream(prompt, [SamplingParams()], arrival=0.0))
                service.service.rotate(b"a" * 32, (new_key, GRANT_KEY))
            before, after = service.handle.calls
            GrantVerifier((GRANT_KEY,)).verify(before)
            GrantVerifier((new_key,)).verify(after)
            assert before.affinity != after.affinity

        run(body)

    @pytest.mark.parametrize("script", [[], [token(1)]])
    def test_stream_without_a_finish_is_an_error_not_an_answer(self, script: Script) -> None:
        async def body() -> None:
            service = Service(script, script)
            with pytest.raises(InternalFault, match="without a finish"):
                await service.service.complete(PROMPT, [SamplingParams()], arrival=0.0)
            service.check_idle()
            assert service.value("request_success_total", finished_reason="stop") is None

        run(body)

    def test_error_of_the_client_passes_and_frees_the_place(self) -> None:
        async def body() -> None:
            service = Service([TokenEvent(error="no_capacity: none")])
            with pytest.raises(NoCapacity):
                await collect(service.stream())
            service.check_idle()

        run(body)


class TestSeveralChoices:
    def test_each_choice_keeps_its_index_seed_and_order(self) -> None:
        async def body() -> None:
            scripts: list[Script] = [[token(10 * index), last(10 * index + 1)] for index in range(3)]
            service = Service(*scripts)
            items = await collect(service.stream(3))
            for index in range(3):
                assert [event for choice, event, _ in items if choice == index] == scripts[index]
            assert sorted(call.sampling.seed for call in service.handle.calls) == [100, 101, 102]
            assert len({call.request_id for call in service.handle.calls}) == 3
            service.check_idle()

        run(body)

    def test_slow_choice_does_not_hold_the_others_back(self) -> None:
        async def body() -> None:
            service = Service([Hold()], [token(1), last(2)])
            events = service.stream(2)
            seen = [await anext(events), await anext(events)]
            assert [index for index, _, _ in seen] == [1, 1]
            await events.aclose()
            service.check_idle()

        run(body)

    def test_whole_answers_come_in_the_order_of_the_choices(self) -> None:
        async def body() -> None:
            service = Service([token(1), token(2), last(3)], [last(9)])
            results = await service.service.complete(
                PROMPT, [SamplingParams(seed=1), SamplingParams(seed=2)], arrival=0.0
            )
            assert [result.token_ids for result in results] == [[1, 2, 3], [9]]

        run(body)

    @pytest.mark.parametrize(
        ("script", "kind"),
        [
            ([TokenEvent(error="no_capacity: none")], NoCapacity),
            ([token(1)], InternalFault),
            ([token(1), ActorDiedError()], ReplicaLost),
            ([token(1), asyncio.CancelledError()], ReplicaLost),
            ([token(1), KeyError("unforeseen")], InternalFault),
        ],
    )
    def test_one_choice_that_fails_ends_all(self, script: Script, kind: type[Exception]) -> None:
        async def body() -> None:
            service = Service(script, [token(5), Hold()], [Hold()])
            with pytest.raises(kind):
                await collect(service.stream(3))
            service.check_idle()
            assert [response.is_cancelled for response in service.handle.responses[1:]] == [True, True]

        run(body)

    def test_choice_cancelled_from_outside_does_not_leave_the_reader_waiting(self) -> None:
        async def body() -> None:
            service = Service([Hold()], [Hold()])
            reading = asyncio.create_task(collect(service.stream(2)))
            await settle()
            (drain, *_) = [task for task in asyncio.all_tasks() if "drain" in repr(task.get_coro())]
            drain.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            service.check_idle()

        run(body)


class TestAdmission:
    def test_more_than_the_limit_is_refused_and_counted(self) -> None:
        async def body() -> None:
            service = Service([token(1), Hold()], [token(1), Hold()], max_inflight=2)
            held = [service.stream(), service.stream()]
            for events in held:
                await anext(events)
            assert service.service.num_inflight == 2
            with pytest.raises(OverCapacity) as error:
                await anext(service.stream())
            assert error.value.retry_after_s is not None
            assert error.value.retry_after_s > 0
            assert len(service.handle.calls) == 2
            for events in held:
                await events.aclose()
            service.check_idle()

        run(body)

    def test_choices_of_one_request_enter_together_or_not_at_all(self) -> None:
        async def body() -> None:
            service = Service([token(1), Hold()], max_inflight=4)
            held = service.stream()
            await anext(held)
            with pytest.raises(OverCapacity):
                await anext(service.stream(4))
            assert service.service.num_inflight == 1
            assert len(service.handle.calls) == 1
            await held.aclose()
            service.check_idle()

        run(body)

    def test_place_is_free_again_after_every_kind_of_end(self) -> None:
        async def body() -> None:
            ends: list[Script] = [[last(1)], [token(1)], [TokenEvent(error="internal_error: x")], [last(1)]]
            service = Service(*ends, max_inflight=1)
            for _ in ends:
                await asyncio.gather(collect(service.stream()), return_exceptions=True)
            service.check_idle()

        run(body)


class TestAbandoned:
    @pytest.mark.parametrize("num_choices", [1, 2])
    def test_cancelled_reader_leaves_nothing(self, num_choices: int) -> None:
        async def body() -> None:
            service = Service(*endless(num_choices))
            task = asyncio.create_task(collect(service.stream(num_choices)))
            await settle()
            assert service.service.num_inflight == num_choices
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            service.check_idle()
            assert all(response.is_cancelled for response in service.handle.responses)

        run(body)

    @pytest.mark.parametrize("num_choices", [1, 2])
    def test_closed_reader_has_cleaned_up_when_close_returns(self, num_choices: int) -> None:
        async def body() -> None:
            service = Service(*endless(num_choices))
            events = service.stream(num_choices)
            await anext(events)
            await settle()
            await events.aclose()
            service.check_idle()
            assert all(response.is_cancelled for response in service.handle.responses)

        run(body)

    @pytest.mark.parametrize("num_choices", [1, 2])
    def test_client_that_disconnects_while_an_event_is_being_sent_leaves_nothing(self, num_choices: int) -> None:
        async def body() -> None:
            service = Service(*endless(num_choices))

            async def events() -> AsyncGenerator[Mapping[str, object], None]:
                async for index, event, _ in service.stream(num_choices):
                    yield {"index": index, "text": event.text}

            async def receive() -> Any:
                await asyncio.Event().wait()

            async def send(message: Any) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()

            response = event_stream((await with_first(events()))())
            scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
            task = asyncio.create_task(response(scope, receive, send))
            await settle()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            del response, task
            await settle()
            service.check_idle()
            assert all(response.is_cancelled for response in service.handle.responses)

        run(body)


class TestTokenLimit:
    def test_asked_for_or_all_the_room_there_is(self) -> None:
        service = Service().service
        assert service.token_limit(60, None) == 40
        assert service.token_limit(60, 40) == 40
        assert service.token_limit(99, 1) == 1

    @pytest.mark.parametrize(("prompt_tokens", "asked"), [(100, None), (101, 1), (60, 41), (1, 10**12)])
    def test_more_than_the_context_holds_is_refused(self, prompt_tokens: int, asked: int | None) -> None:
        with pytest.raises(BadRequest, match="context"):
            Service().service.token_limit(prompt_tokens, asked)


class TestMetrics:
    def test_timeline_and_counters_of_one_answer(self) -> None:
        class Ticking(Clock):
            def __call__(self) -> float:
                self.now += 1.0
                return self.now

        async def body() -> None:
            service = Service(
                [token(1), token(2), TokenEvent(text="held back"), last(3, "length", decode_cache=1, prefill_cache=2)],
                clock=Ticking(),
            )
            (*_, (_, _, timeline)) = await collect(service.stream())
            assert timeline.num_tokens == 3
            assert timeline.ttft_s == 1.0
            assert timeline.e2e_s == 4.0
            assert service.value("time_to_first_token_seconds_sum") == 1.0
            assert service.value("inter_token_latency_seconds_count") == 2
            assert service.value("inter_token_latency_seconds_sum") == 3.0
            assert service.value("request_time_per_output_token_seconds_sum") == 1.5
            assert service.value("e2e_request_latency_seconds_sum") == 4.0
            assert service.value("generation_tokens_total") == 3
            assert service.value("request_success_total", finished_reason="length") == 1
            assert service.value("prompt_tokens_total", origin="decode_cache") == 1
            assert service.value("prompt_tokens_total", origin="prefill_cache") == 2
            assert service.value("prompt_tokens_total", origin="prefill_computed") == 0

        run(body)

    def test_answer_of_one_token_has_no_gap(self) -> None:
        async def body() -> None:
            service = Service([last(1)])
            await collect(service.stream())
            assert service.value("time_to_first_token_seconds_count") == 1
            assert service.value("inter_token_latency_seconds_count") == 0
            assert service.value("request_time_per_output_token_seconds_count") == 0

        run(body)

    def test_retry_is_counted_and_the_answer_counted_once(self) -> None:
        async def body() -> None:
            service = Service([ActorDiedError()], [token(1), last(2)])
            await collect(service.stream())
            assert service.value("decode_retries_total") == 1
            assert service.value("generation_tokens_total") == 2
            assert service.value("time_to_first_token_seconds_count") == 1

        run(body)


class TestAffinity:
    def affinity(self, spans: tuple[ZoneSpan, ...], key: bytes = b"k" * 32, epochs: EpochStore | None = None) -> bytes:
        seen: list[bytes] = []

        class Recorder:
            async def generate(self, call: GenerateCall) -> AsyncGenerator[TokenEvent, None]:
                seen.append(call.affinity)
                yield last(1)

        async def body() -> None:
            service = GenerationService(
                client=cast(DecodeClient, Recorder()),
                config=local_config(),
                affinity_key=key,
                grants=GrantSealer((GRANT_KEY,)),
                epochs=epochs,
                metrics=IngressMetrics(),
            )
            prompt = TokenisedPrompt((1, 2, 3), spans)
            await collect(service.stream(prompt, [SamplingParams()], arrival=0.0))

        run(body)
        return seen[0]

    def test_claims_of_one_plan_go_together_whatever_their_case(self) -> None:
        other_case = Zone.parse("tenant/t/case/d")
        first = self.affinity((ZoneSpan(1, PUBLIC), ZoneSpan(2, PLAN), ZoneSpan(3, CASE)))
        assert first == self.affinity((ZoneSpan(1, PUBLIC), ZoneSpan(2, PLAN), ZoneSpan(3, other_case)))
        assert first != self.affinity((ZoneSpan(1, PUBLIC), ZoneSpan(2, Zone.parse("tenant/u/plan/p"))))

    def test_case_without_a_plan_returns_to_its_own_replica(self) -> None:
        first = self.affinity((ZoneSpan(3, CASE),))
        assert first
        assert first != self.affinity((ZoneSpan(3, Zone.parse("tenant/t/case/d")),))

    @pytest.mark.parametrize("spans", [(ZoneSpan(3, CASE),), (ZoneSpan(2, PLAN), ZoneSpan(3, CASE))])
    def test_a_purge_of_its_zone_changes_it_and_of_another_does_not(self, spans: tuple[ZoneSpan, ...]) -> None:
        epochs = EpochStore(None)
        before = self.affinity(spans, epochs=epochs)
        epochs.raise_epoch(Zone.parse("tenant/t/plan/other"))
        assert self.affinity(spans, epochs=epochs) == before
        epochs.raise_epoch(spans[0].zone)
        assert self.affinity(spans, epochs=epochs) != before

    def test_prompt_that_nobody_caches_has_none(self) -> None:
        assert self.affinity(unlabelled(3)) == b""

    def test_digest_says_nothing_without_the_key(self) -> None:
        spans = (ZoneSpan(3, CASE),)
        assert self.affinity(spans) != self.affinity(spans, key=b"other" * 8)
        assert CASE.path.encode() not in self.affinity(spans)
