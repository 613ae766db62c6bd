"""Sampler: distributions against a full softmax, draws that depend on seed and position alone, rows that fail alone."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
import torch

from engine import sampler as sampler_module
from engine.draw import MAX_COLUMNS, RowChooser, draw_uniform
from engine.errors import EngineError, GrammarError, IntegrityError
from engine.grammar import Grammar
from engine.request import Request, SamplingParams
from engine.sampler import SampledToken, Sampler, SamplingError
from engine.tokenizer import Tokenizer
from tests.engine.row_choosers import reference_ids, row_chooser
from tests.engine.tiny_tokenizer import tiny_tokenizer

SMALL, LARGE = 40, 5000
EOS = 3


class MakeSampler:
    """Samplers over one implementation of the choice within a row."""

    def __init__(self, chooser: RowChooser) -> None:
        self._chooser = chooser

    def __call__(self, vocab_size: int = SMALL) -> Sampler:
        """Over a vocabulary without text: only its size and its end token matter without a grammar."""
        tokenizer = SimpleNamespace(vocab_size=vocab_size, eos_token_ids=frozenset({EOS}))
        return self.over(cast(Tokenizer, tokenizer))

    def over(self, tokenizer: Tokenizer) -> Sampler:
        return Sampler(tokenizer, self._chooser)


@pytest.fixture(scope="module", params=["numpy", "native"])
def make_sampler(request: pytest.FixtureRequest) -> MakeSampler:
    return MakeSampler(row_chooser(request.param))


def make_request(
    request_id: str = "r", *, prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **sampling: Any
) -> Request:
    return Request(
        request_id, prompt, SamplingParams(**{"max_tokens": 10_000, **sampling}), output_token_ids=list(output)
    )


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (rows, vocab_size)).astype(np.float32))


def sample_one(sampler: Sampler, row: torch.Tensor, request: Request) -> SampledToken:
    (result,) = sampler.sample(row.reshape(1, -1), [request])
    assert isinstance(result, SampledToken), result
    return result


def reference(row: torch.Tensor, sampling: SamplingParams) -> dict[int, float]:
    """Probability of each token by the textbook."""
    ids = reference_ids(row.numpy(), sampling)
    logits = row.numpy().astype(np.float64)[ids]
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    return dict(zip(ids, (weights / weights.sum()).tolist(), strict=True))


def chi_square_fits(counts: Counter[int], expected: dict[int, float]) -> bool:
    """Pearson's test after Wilson and Hilferty, 4.5 sigma; cells that expect fewer than 5 are pooled."""
    draws = sum(counts.values())
    cells = [(counts[index], draws * share) for index, share in expected.items() if draws * share >= 5]
    rest = draws - sum(count for count, _ in cells), draws - sum(mean for _, mean in cells)
    if rest[1] >= 5:
        cells.append(rest)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = max(1, len(cells) - 1)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return z < 4.5


TRUNCATIONS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.05, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 10_000, "top_p": 0.999},
]


def truncation_id(truncation: dict[str, float]) -> str:
    return ",".join(f"{key}={value}" for key, value in truncation.items()) or "none"


# Distributions


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=truncation_id)
@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_draws_follow_the_reference_distribution(
    make_sampler: MakeSampler, vocab_size: int, truncation: dict[str, Any]
) -> None:
    sampler = make_sampler(vocab_size)
    row = random_logits(1, vocab_size, seed=4)[0]
    sampling = {"temperature": 1.0, **truncation}
    expected = reference(row, SamplingParams(**sampling))
    num_draws = 2500 if vocab_size == SMALL else 1000
    counts = Counter(
        sample_one(sampler, row, make_request(str(seed), seed=seed, **sampling)).token_id for seed in range(num_draws)
    )
    assert set(counts) <= set(expected)
    assert chi_square_fits(counts, expected)


def test_the_chi_square_test_can_fail() -> None:
    shares = {0: 0.5, 1: 0.5}
    assert chi_square_fits(Counter({0: 1260, 1: 1240}), shares)
    assert not chi_square_fits(Counter({0: 1400, 1: 1100}), shares)


def test_a_row_of_equal_logits_is_drawn_evenly(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(LARGE)
    row = torch.zeros(LARGE)
    request = make_request(temperature=1.0, top_p=0.5, seed=1)
    tokens = set()
    for _ in range(300):
        request.output_token_ids.append(sample_one(sampler, row, request).token_id)
        tokens.add(request.output_token_ids[-1])
    assert len(tokens) > 250
    assert max(tokens) < LARGE / 2


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-4])
def test_a_cold_sampler_is_greedy_and_the_first_of_equals_wins(make_sampler: MakeSampler, temperature: float) -> None:
    row = random_logits(1, LARGE)[0]
    row[[17, 4000]] = row.max() + 1
    token = sample_one(make_sampler(LARGE), row, make_request(temperature=temperature, top_k=1))
    assert token.token_id in ((17, 4000) if temperature > 1e-5 else (17,))


# Draws


def test_draws_are_uniform_and_independent_across_seeds_and_positions() -> None:
    draws = np.array([[draw_uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = Counter((draws * 20).astype(int).ravel().tolist())
    assert chi_square_fits(counts, dict.fromkeys(range(20), 1 / 20))
    for shifted in (draws[1:] - draws[:-1], draws[:, 1:] - draws[:, :-1]):
        counts = Counter(((shifted % 1.0) * 20).astype(int).ravel().tolist())
        assert chi_square_fits(counts, dict.fromkeys(range(20), 1 / 20))


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 40, "logprobs": 3},
    {"temperature": 1.0, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 1.0, "min_tokens": 5},
]


def mixed_requests() -> list[Request]:
    return [
        make_request(str(index), prompt=(1, 2, 5), output=(7, 7, 9)[: index % 4], seed=index, **sampling)
        for index, sampling in enumerate(MIXED * 2)
    ]


def test_a_row_does_not_depend_on_the_batch_it_is_in(make_sampler: MakeSampler) -> None:
    logits = random_logits(len(MIXED) * 2, LARGE)
    alone = [
        make_sampler(LARGE).sample(logits[[index]], [request])[0] for index, request in enumerate(mixed_requests())
    ]
    order = np.random.default_rng(0).permutation(len(alone))
    requests = mixed_requests()
    together = make_sampler(LARGE).sample(logits[order], [requests[index] for index in order])
    assert together == [alone[index] for index in order], "bitwise, logprobs included"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert make_sampler(LARGE).sample(logits, mixed_requests()) == alone
    finally:
        torch.set_num_threads(threads)


def test_a_replica_that_takes_over_draws_the_same_tokens(make_sampler: MakeSampler) -> None:
    logits = random_logits(40, SMALL, seed=9)
    sampling = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "seed": 8}
    first = make_request(**sampling)
    sampler = make_sampler()
    for row in logits:
        first.output_token_ids.append(sample_one(sampler, row, first).token_id)
        sampler.accept(first, first.output_token_ids[-1])
    second = make_request(output=tuple(first.output_token_ids[:20]), **sampling)
    other = make_sampler()
    other.add(second)
    for row in logits[20:]:
        second.output_token_ids.append(sample_one(other, row, second).token_id)
    assert second.output_token_ids == first.output_token_ids


def test_columns_past_the_vocabulary_are_never_drawn_nor_counted(make_sampler: MakeSampler) -> None:
    row = random_logits(1, SMALL + 8)[0]
    row[SMALL:] = 100.0
    for sampling in ({}, {"temperature": 1.0, "logprobs": 2}):
        padded = sample_one(make_sampler(), row, make_request(**sampling))
        assert padded == sample_one(make_sampler(), row[:SMALL].clone(), make_request(**sampling))


def test_tokens_past_the_last_column_are_harmless(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    width = tokenizer.encode('{"')[0] + 1
    row = random_logits(1, width)
    far = tokenizer.vocab_size - 1
    everything = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "min_tokens": 9, "stop_token_ids": (far, 2**70)}
    (token,) = make_sampler.over(tokenizer).sample(row, [make_request(prompt=(far, 1), output=(far,), **everything)])
    assert isinstance(token, SampledToken)
    sampler = make_sampler.over(tokenizer)
    (opened,) = sampler.sample(row, [constrained("object")])
    assert isinstance(opened, SampledToken)
    assert tokenizer.token_bytes(opened.token_id) == b'{"'
    (stuck,) = sampler.sample(row[:, : width - 1], [constrained("stuck")])
    assert isinstance(stuck, SamplingError)


def test_rows_settled_off_the_host_are_those_of_the_host(make_sampler: MakeSampler) -> None:
    logits = random_logits(len(MIXED) * 2, LARGE)
    logits[7, 5] = math.nan  # a plain greedy row
    requests = mixed_requests()
    rows = sampler_module._settle_greedy_rows(logits, requests)
    expected = make_sampler(LARGE).sample(logits, requests)
    assert [row for row in rows if isinstance(row, SampledToken)] == [expected[0]]
    for index, row in enumerate(rows):
        if isinstance(row, np.ndarray):
            np.testing.assert_array_equal(row, logits[index].numpy())


def test_logits_are_left_as_they_were(make_sampler: MakeSampler) -> None:
    logits = random_logits(len(MIXED) * 2, SMALL)
    before = logits.clone()
    make_sampler().sample(logits, mixed_requests())
    assert torch.equal(logits, before)


# Penalties, min_tokens, logprobs


def test_penalties_have_the_usual_meaning(make_sampler: MakeSampler) -> None:
    row = torch.tensor([2.0, -1.0, 3.0, 0.5, 1.0, 0.0])
    request = make_request(
        prompt=(0, 1),
        output=(2, 2, 4),
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    sampler = make_sampler(6)
    shaped = sampler._shaped(row.numpy(), request, sampler._current_state(request))
    # Repetition over prompt and output; frequency and presence over the output alone.
    expected = [2.0 / 2, -1.0 * 2, 3.0 / 2 - 2 * 0.25 - 0.5, 0.5, 1.0 / 2 - 0.25 - 0.5, 0.0]
    assert shaped.tolist() == pytest.approx(expected)


def test_penalties_count_tokens_as_they_come(make_sampler: MakeSampler) -> None:
    row = torch.tensor([1.0, 0.9, 0.0, -9.0, -9.0])
    sampler = make_sampler(5)
    request = make_request(frequency_penalty=0.4)
    for _ in range(6):
        request.output_token_ids.append(sample_one(sampler, row, request).token_id)
    # 1.0, 0.9 | 0.6, 0.9 | 0.6, 0.5 | 0.2, 0.5 | 0.2, 0.1 | -0.2, 0.1
    assert request.output_token_ids == [0, 1, 0, 1, 0, 1]


def test_end_and_stop_tokens_wait_for_min_tokens(make_sampler: MakeSampler) -> None:
    row = torch.zeros(SMALL)
    row[EOS], row[9], row[5] = 9.0, 8.0, 7.0
    sampler = make_sampler()
    picks = []
    for count in range(4):
        request = make_request(str(count), output=(5,) * count, min_tokens=2, stop_token_ids=(9, 10**6, -1))
        picks.append(sample_one(sampler, row, request).token_id)
    assert picks == [5, 5, EOS, EOS]
    assert sample_one(sampler, row, make_request("i", min_tokens=2, ignore_eos=True)).token_id == EOS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_of_the_raw_logits(make_sampler: MakeSampler, temperature: float) -> None:
    row = random_logits(1, LARGE)[0]
    request = make_request(
        temperature=temperature, top_k=5, repetition_penalty=1.5, prompt=(int(row.argmax()),), logprobs=4, seed=3
    )
    token = sample_one(make_sampler(LARGE), row, request)
    expected = torch.log_softmax(row.double(), 0)
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-6)
    values, ids = expected.topk(4)
    assert [index for index, _ in token.top_logprobs] == ids.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-6)


def test_top_logprobs_break_ties_by_id_and_are_optional(make_sampler: MakeSampler) -> None:
    row = torch.zeros(SMALL)
    ids = [index for index, _ in sample_one(make_sampler(), row, make_request(logprobs=3)).top_logprobs]
    assert ids == [0, 1, 2]
    assert sample_one(make_sampler(), row, make_request(logprobs=0)).top_logprobs == ()
    assert sample_one(make_sampler(), row, make_request()).logprob is None
    few = make_sampler(2)
    assert len(sample_one(few, row[:2].clone(), make_request(logprobs=5)).top_logprobs) == 2


# Rows that fail


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 1}], ids=["greedy", "drawn", "logprobs"])
def test_an_unsound_row_fails_alone(make_sampler: MakeSampler, bad: float, sampling: dict[str, Any]) -> None:
    logits = random_logits(3, SMALL)
    clean = make_sampler().sample(logits.clone(), [make_request(str(row), **sampling) for row in range(3)])
    logits[1, 30] = bad
    results = make_sampler().sample(logits, [make_request(str(row), **sampling) for row in range(3)])
    assert isinstance(results[1], SamplingError)
    assert [results[0], results[2]] == [clean[0], clean[2]]


def test_a_row_without_any_possible_token_fails(make_sampler: MakeSampler) -> None:
    (result,) = make_sampler().sample(torch.full((1, SMALL), -math.inf), [make_request()])
    assert isinstance(result, SamplingError)


@pytest.mark.parametrize("logits", [torch.zeros(2, SMALL), torch.zeros(SMALL), torch.zeros(1, SMALL).double()])
def test_logits_of_the_wrong_form_are_refused(make_sampler: MakeSampler, logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits are"):
        make_sampler().sample(logits, [make_request()])


# Grammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "risk": {"enum": ["low", "high"]},
        "lines": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
        "why": {"type": "string", "maxLength": 10},
    },
    "required": ["risk", "lines", "why"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def constrained(request_id: str, schema: object = SCHEMA, **sampling: Any) -> Request:
    return make_request(request_id, json_schema=json.dumps(schema), **sampling)


def generate(sampler: Sampler, tokenizer: Tokenizer, request: Request, seed: int) -> str:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        row = torch.from_numpy(rng.normal(0, 3, tokenizer.vocab_size).astype(np.float32))
        token_id = sample_one(sampler, row, request).token_id
        request.output_token_ids.append(token_id)
        sampler.accept(request, token_id)
        if token_id in tokenizer.eos_token_ids:
            return tokenizer.decode(request.output_token_ids)
    raise AssertionError("no end")


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.5, "top_p": 0.3},
        {"temperature": 1.0, "top_k": 2, "repetition_penalty": 1.3},
        {"min_tokens": 200, "presence_penalty": 1.0},
    ],
    ids=truncation_id,
)
def test_random_logits_give_valid_json_and_an_end(
    make_sampler: MakeSampler, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    sampler = make_sampler.over(tokenizer)
    for seed in range(12):
        request = constrained(str(seed), seed=seed, **sampling)
        sampler.add(request)
        jsonschema.validate(json.loads(generate(sampler, tokenizer, request, seed)), SCHEMA)


def test_a_grammar_ends_only_with_an_end_token(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    sampler = make_sampler.over(tokenizer)
    request = constrained("r", {"const": 1})
    one = tokenizer.encode("1")[0]
    row = torch.zeros(tokenizer.vocab_size)
    row[one] = 5.0
    for expected in ({one}, {0, 2}, {0, 2}):
        token_id = sample_one(sampler, row, request).token_id
        assert token_id in expected
        request.output_token_ids.append(token_id)
        sampler.accept(request, token_id)


def test_a_bad_schema_is_refused_when_the_request_is_added(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    sampler = make_sampler.over(tokenizer)
    with pytest.raises(GrammarError):
        sampler.add(constrained("bad", {"type": "strng"}))
    rows = random_logits(2, tokenizer.vocab_size)
    results = sampler.sample(rows, [constrained("bad", {"type": "strng"}), make_request("good")])
    assert isinstance(results[0], GrammarError)
    assert isinstance(results[1], SampledToken)


def test_a_replayed_output_continues_in_its_grammar(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    whole = constrained("r", temperature=1.0, seed=5)
    text = generate(make_sampler.over(tokenizer), tokenizer, whole, seed=5)
    for split in range(len(whole.output_token_ids)):
        sampler = make_sampler.over(tokenizer)
        resumed = constrained("r", temperature=1.0, seed=5, output=tuple(whole.output_token_ids[:split]))
        sampler.add(resumed)
        sampler.add(resumed)
        rng = np.random.default_rng(5)
        for _ in range(split):
            rng.normal(0, 3, tokenizer.vocab_size)
        row = torch.from_numpy(rng.normal(0, 3, tokenizer.vocab_size).astype(np.float32))
        assert sample_one(sampler, row, resumed).token_id == whole.output_token_ids[split]
    assert json.loads(text)


def test_a_token_from_elsewhere_that_breaks_the_grammar_fails_that_request_only(
    make_sampler: MakeSampler, tokenizer: Tokenizer
) -> None:
    sampler = make_sampler.over(tokenizer)
    broken, sound = constrained("broken"), constrained("sound")
    for request in (broken, sound):
        sampler.add(request)
    alien = tokenizer.encode("x")[0]
    broken.output_token_ids.append(alien)
    sampler.accept(broken, alien)
    sampler.accept(broken, alien)
    results = sampler.sample(random_logits(2, tokenizer.vocab_size), [broken, sound])
    assert isinstance(results[0], GrammarError)
    assert isinstance(results[1], SampledToken)


def test_a_token_that_was_not_accepted_is_an_integrity_error(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    sampler = make_sampler.over(tokenizer)
    request = constrained("r")
    sampler.add(request)
    request.output_token_ids.append(tokenizer.encode("{")[0])
    (result,) = sampler.sample(random_logits(1, tokenizer.vocab_size), [request])
    assert isinstance(result, IntegrityError)
    assert isinstance(result, EngineError)


def test_a_removed_request_leaves_nothing_behind(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    sampler = make_sampler.over(tokenizer)
    sampler.add(constrained("r"))
    sampler.remove("r")
    sampler.remove("r")
    sampler.accept(make_request("r"), 5)
    assert not sampler._states


def test_accepting_before_adding_is_made_good_by_the_replay(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    sampler = make_sampler.over(tokenizer)
    request = constrained("r")
    brace = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"{")
    sampler.accept(request, brace)
    request.output_token_ids.append(brace)
    row = random_logits(1, tokenizer.vocab_size)[0]
    assert tokenizer.token_bytes(sample_one(sampler, row, request).token_id).startswith(b'"')


# Masks ahead of the logits


def step(sampler: Sampler, logits: torch.Tensor, requests: list[Request], *, ahead: bool) -> list[int]:
    """One sampled token of each request, appended and accepted."""
    if ahead:
        sampler.prepare(requests)
    results = sampler.sample(logits, requests)
    tokens = []
    for request, result in zip(requests, results, strict=True):
        assert isinstance(result, SampledToken), result
        tokens.append(result.token_id)
        request.output_token_ids.append(result.token_id)
        sampler.accept(request, result.token_id)
    return tokens


def test_masks_are_ready_when_they_were_prepared_and_the_tokens_are_the_same(
    make_sampler: MakeSampler, tokenizer: Tokenizer
) -> None:
    walks = []
    for ahead in (True, False):
        sampler = make_sampler.over(tokenizer)
        requests = [constrained(str(seed), temperature=1.0, seed=seed) for seed in range(4)]
        requests.append(make_request("free", temperature=1.0))
        for request in requests:
            sampler.add(request)
        walks.append(
            [step(sampler, random_logits(5, tokenizer.vocab_size, seed), requests, ahead=ahead) for seed in range(8)]
        )
        counts = (sampler.num_masks_ahead, sampler.num_masks_on_demand)
        assert counts == ((32, 0) if ahead else (0, 32))
        sampler.close()
    assert walks[0] == walks[1]


def test_a_mask_that_was_prepared_for_a_step_that_failed_serves_the_next(
    make_sampler: MakeSampler, tokenizer: Tokenizer
) -> None:
    sampler = make_sampler.over(tokenizer)
    requests = [constrained("a"), constrained("b")]
    for request in requests:
        sampler.add(request)
    sampler.prepare(requests[:1])
    sampler.prepare(requests)
    step(sampler, random_logits(2, tokenizer.vocab_size), requests, ahead=False)
    assert (sampler.num_masks_ahead, sampler.num_masks_on_demand) == (2, 0)


def test_requests_that_are_unknown_or_have_failed_may_be_prepared(
    make_sampler: MakeSampler, tokenizer: Tokenizer
) -> None:
    sampler = make_sampler.over(tokenizer)
    unknown, broken = constrained("unknown"), constrained("broken")
    sampler.add(broken)
    sampler.accept(broken, tokenizer.encode("x")[0])
    sampler.prepare([unknown, broken])
    results = sampler.sample(random_logits(2, tokenizer.vocab_size), [unknown, broken])
    assert isinstance(results[0], SampledToken)
    assert isinstance(results[1], GrammarError)
    assert sampler.num_masks_on_demand == 1


def test_a_grammar_that_fails_in_the_worker_fails_its_own_request(
    make_sampler: MakeSampler, tokenizer: Tokenizer
) -> None:
    sampler = make_sampler.over(tokenizer)
    pattern = "(" + "|".join(f"(.*{chr(97 + n % 26)}.{{{n}}})" for n in range(100)) + ")+"
    costly = constrained("costly", {"type": "string", "pattern": pattern}, temperature=1.0)
    sound = constrained("sound", temperature=1.0)
    for request in (costly, sound):
        sampler.add(request)
    for seed in range(200):
        requests = [costly, sound]
        sampler.prepare(requests)
        results = sampler.sample(random_logits(2, tokenizer.vocab_size, seed), requests)
        assert isinstance(results[1], SampledToken)
        if isinstance(results[0], GrammarError):
            break
        assert isinstance(results[0], SampledToken)
        costly.output_token_ids.append(results[0].token_id)
        sampler.accept(costly, results[0].token_id)
    assert isinstance(results[0], GrammarError)
    assert "too many expressions" in str(results[0])
    assert sampler.num_masks_on_demand == 0


class Watch:
    """Sees to it that no grammar is in the hands of two threads: the real methods, made slow enough to meet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._inside: set[int] = set()
        self._lock = threading.Lock()
        self.num_overlaps = 0
        self.threads: set[str] = set()
        for name in ("compute_mask", "consume"):
            monkeypatch.setattr(Grammar, name, self._watched(getattr(Grammar, name)))

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(grammar: Grammar, *arguments: object) -> Any:
            with self._lock:
                self.num_overlaps += id(grammar) in self._inside
                self._inside.add(id(grammar))
                self.threads.add(threading.current_thread().name.split("_")[0])
            time.sleep(0.0005)
            try:
                return method(grammar, *arguments)
            finally:
                with self._lock:
                    self._inside.discard(id(grammar))

        return watched


def test_no_grammar_is_in_two_hands_whatever_comes_between(
    make_sampler: MakeSampler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    sampler = make_sampler.over(tokenizer)
    rng = random.Random(3)
    live: dict[str, Request] = {}
    num_sampled = 0
    for turn in range(300):
        requests = rng.sample(list(live.values()), rng.randint(0, len(live)))
        match rng.randrange(7):
            case 0 if len(live) < 6:  # a new request, often under the id of one that was aborted
                request = constrained(f"r{rng.randrange(8)}", temperature=1.0, seed=turn)
                if request.request_id not in live:
                    sampler.add(request)
                    live[request.request_id] = request
            case 1 if live:  # an abort, perhaps of a request whose mask is being computed
                request_id = rng.choice(list(live))
                sampler.remove(request_id)
                del live[request_id]
            case 2:  # a step whose execution fails
                sampler.prepare(requests)
            case 3 if requests:  # a first token from elsewhere
                sampler.prepare(requests)
                for request in [request for request in requests if not request.output_token_ids]:
                    token_id = tokenizer.encode('{"')[0]
                    request.output_token_ids.append(token_id)
                    sampler.accept(request, token_id)
            case _ if requests:
                logits = random_logits(len(requests), tokenizer.vocab_size, turn)
                num_sampled += len(step(sampler, logits, requests, ahead=rng.random() < 0.7))
    sampler.close()
    assert watch.num_overlaps == 0
    assert watch.threads == {"MainThread", "grammar-masks"}
    assert min(num_sampled, sampler.num_masks_ahead) > 50
    assert sampler.num_masks_ahead + sampler.num_masks_on_demand == num_sampled


def test_an_abort_does_not_wait_for_a_mask_and_its_id_may_be_used_again(
    make_sampler: MakeSampler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, may_go_on = Grammar.compute_mask, threading.Event()

    def held(grammar: Grammar) -> None:
        assert threading.current_thread() is threading.main_thread() or may_go_on.wait(10.0)
        compute(grammar)

    monkeypatch.setattr(Grammar, "compute_mask", held)
    sampler = make_sampler.over(tokenizer)
    first = constrained("r")
    sampler.add(first)
    sampler.prepare([first])
    sampler.remove("r")
    second = constrained("r", {"const": 7})
    sampler.add(second)
    may_go_on.set()
    (token,) = sampler.sample(random_logits(1, tokenizer.vocab_size), [second])
    assert isinstance(token, SampledToken)
    assert tokenizer.token_bytes(token.token_id) == b"7"
    assert sampler.num_masks_on_demand == 1


def test_a_closed_sampler_computes_masks_on_demand(make_sampler: MakeSampler, tokenizer: Tokenizer) -> None:
    sampler = make_sampler.over(tokenizer)
    request = constrained("r")
    sampler.add(request)
    sampler.close()
    step(sampler, random_logits(1, tokenizer.vocab_size), [request], ahead=True)
    assert (sampler.num_masks_ahead, sampler.num_masks_on_demand) == (0, 1)


def test_a_vocabulary_whose_sums_would_not_be_exact_is_refused(make_sampler: MakeSampler) -> None:
    make_sampler(MAX_COLUMNS)
    with pytest.raises(ValueError, match="is larger than"):
        make_sampler(MAX_COLUMNS + 1)
