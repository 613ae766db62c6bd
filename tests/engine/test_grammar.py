"""Grammar: any sequence of allowed tokens ends in text that the schema accepts; limits hold; errors have words."""

from __future__ import annotations

import gc
import json
import random
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.errors import GrammarError
from engine.grammar import MAX_SCHEMA_BYTES, Grammar, GrammarCompiler, MaskWorker
from engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizer import tiny_tokenizer

REVIEW: dict[str, Any] = {
    "type": "object",
    "properties": {
        "risk": {"enum": ["none", "low", "high"]},
        "lines": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3},
        "why": {"type": "string", "maxLength": 12},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "deny": {"type": "boolean"},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
    },
    "required": ["risk", "lines", "why", "score", "deny", "note"],
    "additionalProperties": False,
}
SCHEMAS = [
    REVIEW,
    {"type": "array", "items": REVIEW, "maxItems": 2},
    {"enum": ["é😀", 'quo"te', "back\\slash", None, 3.5]},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"$defs": {"d": {"const": {"a": [1, {"b": None}]}}}, "$ref": "#/$defs/d"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def allowed_ids(grammar: Grammar) -> list[int]:
    return np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")).tolist()  # type: ignore[no-any-return]


def random_walk(grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, limit: int) -> list[int]:
    """Tokens up to and without the end token."""
    output: list[int] = []
    while len(output) < limit:
        token_id = rng.choice(allowed_ids(grammar))
        grammar.consume(token_id)
        if token_id in tokenizer.eos_token_ids:
            return output
        output.append(token_id)
    raise AssertionError(f"no end after {limit} tokens")


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_random_allowed_tokens_always_give_valid_json(
    schema: dict[str, Any], tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    rng = random.Random(1)
    for _ in range(15):
        output = random_walk(compiler.compile(json.dumps(schema)), tokenizer, rng, limit=600)
        jsonschema.validate(json.loads(tokenizer.decode(output)), schema)
        assert not tokenizer.special_token_ids.intersection(output)


def test_json_is_written_with_one_kind_of_space(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": [1, 2]}, "b": {"const": True}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    output = random_walk(compiler.compile(json.dumps(schema)), tokenizer, random.Random(0), limit=100)
    assert tokenizer.decode(output) == json.dumps({"a": [1, 2], "b": True})


def test_only_end_tokens_may_follow_complete_text(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile('{"const": true}')
    assert not grammar.is_accepting
    for token_id in tokenizer.encode("true"):
        assert not grammar.is_terminated
        grammar.consume(token_id)
    assert grammar.is_terminated
    assert grammar.is_accepting
    for end in (2, 0, 2):  # with ignore_eos a request goes on past its end
        assert allowed_ids(grammar) == [0, 2]
        grammar.consume(end)
    with pytest.raises(GrammarError):
        grammar.consume(tokenizer.encode("x")[0])


def test_an_end_token_is_allowed_where_the_text_may_end(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile('{"type": "integer"}')
    grammar.consume(tokenizer.encode("7")[0])
    allowed = set(allowed_ids(grammar))
    assert grammar.is_accepting
    assert not grammar.is_terminated
    assert tokenizer.eos_token_ids < allowed


def test_errors_do_not_quote_what_was_generated(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile('{"type": "object", "properties": {"a": {"type": "string"}}}')
    for token_id in tokenizer.encode('{"a": "Miller'):
        grammar.consume(token_id)
    with pytest.raises(GrammarError) as refusal:
        grammar.consume(tokenizer.encode("\n")[0])
    assert "does not fit" in str(refusal.value)
    with pytest.raises(GrammarError) as failure:
        grammar.mask()
    assert "mil" not in str(failure.value).lower()
    assert "\\n" not in str(failure.value), "the token that did not fit"


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ("nope", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "not valid JSON"),
        ('{"type": "strng"}', "strng"),
        ('{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
        ('{"not": {"type": "string"}, "x-guidance": {"lenient": true}}', "Unimplemented keys"),
        ('{"$ref": "http://example.org/schema"}', "does not fetch"),
        ('{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        (json.dumps({"enum": ["x" * MAX_SCHEMA_BYTES]}), f"longer than {MAX_SCHEMA_BYTES} bytes"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_with_the_reason(
    schema: str, fault: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError, match=fault):
        compiler.compile(schema)


def test_a_schema_cannot_loosen_the_white_space(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile('{"const": [1, 2], "x-guidance": {"whitespace_flexible": true}}')
    grammar.consume(tokenizer.encode("[")[0])
    assert [tokenizer.decode([token]) for token in allowed_ids(grammar)] == ["1"]


def test_a_schema_that_costs_too_much_is_cut_off(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    pattern = "(" + "|".join(f"(.*{chr(97 + n % 26)}.{{{n}}})" for n in range(100)) + ")+"
    with pytest.raises(GrammarError, match="too many expressions"):
        random_walk(
            compiler.compile(json.dumps({"type": "string", "pattern": pattern})),
            tokenizer,
            random.Random(0),
            limit=200,
        )


def test_grammars_of_one_schema_are_compiled_once_and_independent(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    schema = '{"const": 12}'
    first, second = compiler.compile(schema), compiler.compile(schema)
    assert len(compiler._compiled) == 1
    first.consume(tokenizer.encode("1")[0])
    assert tokenizer.decode(allowed_ids(second)[:1])[0] == "1"
    assert not compiler.compile(schema).is_accepting


def test_the_least_recently_used_grammar_is_dropped(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, max_cached=2)
    for value in (1, 2, 1, 3):
        compiler.compile(json.dumps({"const": value}))
    assert list(compiler._compiled) == ['{"const": 1}', '{"const": 3}']


def test_a_schema_that_is_refused_is_not_kept(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    with pytest.raises(GrammarError):
        compiler.compile("nope")
    assert not compiler._compiled


# Masks ahead


class Held(Grammar):
    """The real grammar; `compute_mask` waits until it is told to go on."""

    def __init__(self, grammar: Grammar, vocab_size: int) -> None:
        super().__init__(grammar._matcher, vocab_size)
        self.is_entered, self.may_go_on = threading.Event(), threading.Event()

    def compute_mask(self) -> None:
        self.is_entered.set()
        assert self.may_go_on.wait(10.0)
        super().compute_mask()


def mask_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grammar-masks")]


def test_a_mask_that_is_ready_is_not_computed_again(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(json.dumps(REVIEW))
    grammar.compute_mask()
    expected = grammar.mask().copy()
    grammar._bits[:] = -1  # what a second computation would overwrite
    assert set(grammar.mask().tolist()) == {-1}
    grammar.consume(tokenizer.encode('{"')[0])
    assert not grammar.has_mask
    assert grammar.mask().tolist() != expected.tolist()


def test_a_worker_computes_what_the_caller_would(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    worker = MaskWorker()
    ahead = [compiler.compile(json.dumps(schema)) for schema in SCHEMAS]
    worker.start(ahead)
    worker.wait()
    assert all(grammar.has_mask for grammar in ahead)
    for grammar, schema in zip(ahead, SCHEMAS, strict=True):
        assert allowed_ids(grammar) == allowed_ids(compiler.compile(json.dumps(schema)))
    worker.close()


def test_a_failure_in_the_worker_is_told_by_its_own_grammar(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    worker = MaskWorker()
    broken, sound = compiler.compile('{"const": 1}'), compiler.compile('{"const": 1}')
    with pytest.raises(GrammarError):
        broken.consume(tokenizer.encode("x")[0])
    worker.start([broken, sound])
    worker.wait()
    with pytest.raises(GrammarError, match="an earlier token does not fit"):
        broken.mask()
    assert allowed_ids(sound) == [tokenizer.encode("1")[0]]
    worker.close()


def test_a_worker_runs_beside_its_caller_and_one_batch_at_a_time(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    worker = MaskWorker()
    first = Held(compiler.compile('{"const": 1}'), tokenizer.vocab_size)
    second = compiler.compile('{"const": 1}')
    worker.start([first])
    assert first.is_entered.wait(10.0)
    assert not first.has_mask
    timer = threading.Timer(0.05, first.may_go_on.set)
    timer.start()
    worker.start([second])  # waits for the first
    assert first.has_mask
    worker.wait()
    assert second.has_mask
    worker.close()
    timer.join()


def test_a_closed_worker_finishes_its_batch_ends_its_thread_and_leaves_masks_to_the_caller(
    compiler: GrammarCompiler,
) -> None:
    before = set(mask_threads())
    worker = MaskWorker()
    worker.start([])
    assert set(mask_threads()) == before, "no thread before there is work"
    grammar, late = compiler.compile('{"const": 1}'), compiler.compile('{"const": 1}')
    worker.start([grammar])
    worker.close()
    worker.close()
    assert grammar.has_mask
    assert set(mask_threads()) == before
    worker.start([late])
    worker.wait()
    assert not late.has_mask
    assert late.mask().any()


def test_the_thread_ends_with_the_last_reference_to_its_worker(compiler: GrammarCompiler) -> None:
    before = set(mask_threads())
    worker = MaskWorker()
    worker.start([compiler.compile('{"const": 1}')])
    worker.wait()
    (thread,) = set(mask_threads()) - before
    del worker
    gc.collect()
    thread.join(10.0)
    assert not thread.is_alive()
