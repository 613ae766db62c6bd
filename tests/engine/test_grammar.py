"""Grammar: any sequence of allowed tokens ends in text that the schema accepts; limits hold; errors have words."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from engine.errors import GrammarError
from engine.grammar import MAX_SCHEMA_BYTES, Grammar, GrammarCompiler
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


def random_walk(grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, limit: int) -> list[int]:
    """Tokens up to and without the end token."""
    output: list[int] = []
    while len(output) < limit:
        token_id = int(rng.choice(grammar.allowed_token_ids()))
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
        assert grammar.allowed_token_ids().tolist() == [0, 2]
        grammar.consume(end)
    with pytest.raises(GrammarError):
        grammar.consume(tokenizer.encode("x")[0])


def test_an_end_token_is_allowed_where_the_text_may_end(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile('{"type": "integer"}')
    grammar.consume(tokenizer.encode("7")[0])
    allowed = set(grammar.allowed_token_ids().tolist())
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
        grammar.allowed_token_ids()
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
    assert [tokenizer.decode([token]) for token in grammar.allowed_token_ids()] == ["1"]


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
    assert tokenizer.decode(second.allowed_token_ids().tolist()[:1])[0] == "1"
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
