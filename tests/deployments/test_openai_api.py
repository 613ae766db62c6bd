"""Bodies of the OpenAI-compatible endpoints: what is accepted, what each refusal says, how answers look."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.errors import BadRequest
from deployments.http import bad_request
from deployments.messages import TokenLogprob
from deployments.openai_api import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_CHOICES,
    MAX_MESSAGES,
    STRIPPED_PARAMETERS,
    ChatRequest,
    CompletionLogprobs,
    CompletionRequest,
    chat_logprobs,
    strip_client_parameters,
    usage,
)
from engine.request import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS

USER = {"role": "user", "content": "hello"}


def chat(**changes: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [USER]} | changes)


def completion(**changes: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hello"} | changes)


def refusal(kind: type[ChatRequest | CompletionRequest], document: dict[str, Any]) -> BadRequest:
    with pytest.raises(ValidationError) as error:
        kind.model_validate(document)
    return bad_request(error.value)


class TestGoodBodies:
    def test_shortest_chat_takes_openais_defaults(self) -> None:
        body = chat()
        sampling = body.sampling(max_tokens=8, seed=3, logprobs=body.num_logprobs)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        assert (sampling.max_tokens, sampling.seed, sampling.stop, sampling.logprobs) == (8, 3, (), None)
        assert sampling.json_schema is None
        assert (body.n, body.stream, body.token_limit) == (1, False, None)

    def test_every_parameter_reaches_the_engine(self) -> None:
        body = chat(
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.1,
            stop=["a", "b"],
            stop_token_ids=[7, 8],
            ignore_eos=True,
            min_tokens=2,
            logprobs=True,
            top_logprobs=3,
        )
        sampling = body.sampling(max_tokens=8, seed=9, logprobs=body.num_logprobs)
        assert sampling.temperature == 0.5
        assert sampling.top_p == 0.9
        assert sampling.top_k == 40
        assert sampling.min_p == 0.1
        assert sampling.presence_penalty == 0.5
        assert sampling.frequency_penalty == -0.5
        assert sampling.repetition_penalty == 1.1
        assert sampling.stop == ("a", "b")
        assert sampling.stop_token_ids == (7, 8)
        assert sampling.ignore_eos
        assert sampling.min_tokens == 2
        assert sampling.logprobs == 3

    def test_integers_are_taken_where_numbers_are_asked_for(self) -> None:
        assert chat(temperature=0).sampling(1, 0, None).temperature == 0.0

    def test_top_k_minus_one_is_off(self) -> None:
        assert chat(top_k=-1).sampling(1, 0, None).top_k == 0

    def test_one_stop_string_needs_no_list(self) -> None:
        assert chat(stop="END").sampling(1, 0, None).stop == ("END",)
        assert chat(stop=[]).sampling(1, 0, None).stop == ()
        assert chat(stop=None).sampling(1, 0, None).stop == ()

    def test_message_in_parts_is_joined(self) -> None:
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text() == "hello"
        assert chat(messages=[{"role": "user", "content": []}]).messages[0].text() == ""

    def test_newer_name_of_the_token_limit_wins(self) -> None:
        assert chat(max_tokens=5).token_limit == 5
        assert chat(max_tokens=5, max_completion_tokens=7).token_limit == 7

    def test_logprobs_of_chat_are_a_switch_and_a_count(self) -> None:
        assert chat(logprobs=True).num_logprobs == 0
        assert chat(logprobs=True, top_logprobs=MAX_TOP_LOGPROBS).num_logprobs == MAX_TOP_LOGPROBS
        assert chat(top_logprobs=3).num_logprobs is None

    def test_logprobs_of_completions_are_a_count(self) -> None:
        assert completion().num_logprobs is None
        assert completion(logprobs=0).num_logprobs == 0

    def test_completions_default_to_sixteen_tokens(self) -> None:
        assert completion().token_limit == DEFAULT_COMPLETION_TOKENS == 16
        assert completion(max_tokens=1).token_limit == 1

    @pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3]])
    def test_prompt_is_text_or_token_ids(self, prompt: object) -> None:
        assert completion(prompt=prompt).prompt == prompt

    def test_response_formats_become_schemas(self) -> None:
        schema = {"type": "object", "properties": {"ü": {"const": 1}}}
        asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
        text = chat(response_format=asked).sampling(1, 0, None).json_schema
        assert text is not None
        assert json.loads(text) == schema
        assert chat(response_format={"type": "json_object"}).sampling(1, 0, None).json_schema == '{"type":"object"}'
        assert chat(response_format={"type": "text"}).sampling(1, 0, None).json_schema is None

    def test_bodies_are_frozen(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            chat().n = 3


BAD_PARAMETERS: list[tuple[str, object]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.0),
    ("max_tokens", "16"),
    ("max_tokens", True),
    ("model", ""),
    ("model", "m" * 257),
    ("model", None),
    ("model", 5),
    ("n", 0),
    ("n", MAX_CHOICES + 1),
    ("n", None),
    ("n", "1"),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", math.inf),
    ("temperature", math.nan),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", 11),
    ("seed", -1),
    ("seed", 2**62),
    ("seed", 1.5),
    ("seed", True),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", True),
    ("stream_options", {"include_usage": 1}),
    ("stream_options", {"colour": "red"}),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [True]),
    ("min_tokens", -1),
    ("ignore_eos", "true"),
    ("user", "u" * 257),
    ("metadata", {"a": 1}),
    ("response_format", "json"),
    ("response_format", {}),
    ("response_format", {"type": "yaml"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": []}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "name": "n" * 65}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "colour": "red"}}),
    ("response_format", {"type": "text", "colour": "red"}),
    ("logprobs", "yes"),
    ("colour", "red"),
    ("tools", []),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMETERS)
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_bad_parameter_is_refused_by_name(
    kind: type[ChatRequest | CompletionRequest], name: str, value: object
) -> None:
    given_prompt = {"messages": [USER]} if kind is ChatRequest else {"prompt": "hello"}
    error = refusal(kind, {"model": "m", **given_prompt, name: value})
    assert error.param is not None
    assert error.param.split(".")[0] == name
    assert name in error.message
    assert error.status == 400


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        {},
        [None],
        ["hello"],
        [{}],
        [{"role": "user"}],
        [{"content": "hello"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "king", "content": "hello"}],
        [{"role": "user", "content": "hello", "colour": "red"}],
        [{"role": "user", "content": "hello", "name": "n" * 65}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": ["hello"]}],
        [USER] * (MAX_MESSAGES + 1),
    ],
)
def test_messages_that_are_none_are_refused(messages: object) -> None:
    error = refusal(ChatRequest, {"model": "m", "messages": messages})
    assert error.param is not None
    assert error.param.startswith("messages")


@pytest.mark.parametrize("prompt", [None, "", [], 5, {}, ["a", "b"], ["a", 1], [1, "a"], [1.5], [True], [[1]], [None]])
def test_prompt_that_is_none_is_refused(prompt: object) -> None:
    error = refusal(CompletionRequest, {"model": "m", "prompt": prompt})
    assert error.param is not None
    assert error.param.startswith("prompt")


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_field_is_named(name: str) -> None:
    document = {"model": "m", "messages": [USER]}
    del document[name]
    assert refusal(ChatRequest, document).message == f"{name}: Field required"


@pytest.mark.parametrize("logprobs", [-1, MAX_TOP_LOGPROBS + 1, True])
def test_too_many_logprobs_are_refused(logprobs: object) -> None:
    assert refusal(CompletionRequest, {"model": "m", "prompt": "a", "logprobs": logprobs}).param == "logprobs"
    chat_body = {"model": "m", "messages": [USER], "logprobs": True, "top_logprobs": logprobs}
    assert refusal(ChatRequest, chat_body).param == "top_logprobs"


def test_echo_is_refused() -> None:
    assert refusal(CompletionRequest, {"model": "m", "prompt": "a", "echo": True}).param == "echo"


def test_more_least_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(BadRequest, match="min_tokens"):
        chat(min_tokens=9).sampling(max_tokens=8, seed=0, logprobs=None)


def test_json_schema_without_a_schema_is_refused() -> None:
    with pytest.raises(BadRequest, match="needs json_schema") as error:
        chat(response_format={"type": "json_schema"}).sampling(1, 0, None)
    assert error.value.param == "response_format"


def test_schema_with_a_number_out_of_range_is_refused() -> None:
    schema = json.loads('{"maximum": 1e400}')
    with pytest.raises(BadRequest, match="number out of range"):
        chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}}).sampling(1, 0, None)


def test_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises((BadRequest, ValidationError)):
        chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}}).sampling(1, 0, None)


def test_refusal_does_not_repeat_what_the_client_sent() -> None:
    secret = "member-4711"
    document = {"model": "m", "messages": [{"role": secret, "content": 5}], "temperature": secret, "stop": [5]}
    assert secret not in refusal(ChatRequest, document).message


def test_parameters_that_name_a_cache_are_removed_and_reported() -> None:
    document = {
        "model": "m",
        "zone": "public",
        "cache_salt": "s",
        "kv_transfer_params": None,
        "metadata": {"zone": "z"},
    }
    stripped = {name: document[name] for name in ("cache_salt", "kv_transfer_params", "zone")}
    assert strip_client_parameters(document) == stripped
    assert document == {"model": "m", "metadata": {"zone": "z"}}
    assert strip_client_parameters(document) == {}


@pytest.mark.parametrize("name", STRIPPED_PARAMETERS)
def test_no_stripped_parameter_is_part_of_a_body(name: str) -> None:
    assert refusal(ChatRequest, {"model": "m", "messages": [USER], name: "x"}).param == name
    document = {"model": "m", "messages": [USER], name: "x"}
    strip_client_parameters(document)
    ChatRequest.model_validate(document)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(ChatRequest.model_fields)), JSON_VALUES)
def test_any_value_of_a_field_ends_in_parameters_or_a_refusal(name: str, value: object) -> None:
    document = {"model": "m", "messages": [USER], name: value}
    try:
        ChatRequest.model_validate(document).sampling(4, 0, None)
    except ValidationError as error:
        bad_request(error)
    except BadRequest:
        pass


def test_usage_adds_up() -> None:
    counts = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert usage(7, 5) == counts
    assert usage(7, 5, 0) == counts | {"prompt_tokens_details": {"cached_tokens": 0}}


VOCABULARY = {1: b"he", 2: "ü".encode(), 3: b"llo", 4: b"\xf0\x9f", 5: b"\x9a\x80", 6: b"!"}
ITEMS = (
    TokenLogprob(1, "he", -0.5, ((1, "he", -0.5), (2, "ü", -1.5))),
    TokenLogprob(3, "llo", -0.25),
)
ROCKET = (
    TokenLogprob(4, "\ufffd", -0.5, ((4, "\ufffd", -0.5), (5, "\ufffd", -1.5))),
    TokenLogprob(5, "\ufffd", -0.25),
    TokenLogprob(6, "!", -0.125),
)


def test_chat_logprobs_have_openais_shape() -> None:
    assert chat_logprobs(ITEMS, VOCABULARY.__getitem__) == {
        "content": [
            {
                "token": "he",
                "logprob": -0.5,
                "bytes": [104, 101],
                "top_logprobs": [
                    {"token": "he", "logprob": -0.5, "bytes": [104, 101]},
                    {"token": "ü", "logprob": -1.5, "bytes": [195, 188]},
                ],
            },
            {"token": "llo", "logprob": -0.25, "bytes": [108, 108, 111], "top_logprobs": []},
        ]
    }
    assert chat_logprobs((), VOCABULARY.__getitem__) is None


def test_bytes_of_split_characters_add_up_to_the_text() -> None:
    answer: Any = chat_logprobs(ROCKET, VOCABULARY.__getitem__)
    assert bytes(byte for item in answer["content"] for byte in item["bytes"]).decode() == "🚀!"
    assert [item["bytes"] for item in answer["content"][0]["top_logprobs"]] == [[0xF0, 0x9F], [0x9A, 0x80]]


def test_completion_logprobs_count_characters() -> None:
    assert CompletionLogprobs(VOCABULARY.__getitem__).take(ITEMS) == {
        "tokens": ["he", "llo"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"he": -0.5, "ü": -1.5}, {}],
        "text_offset": [0, 2],
    }
    assert CompletionLogprobs(VOCABULARY.__getitem__).take(()) is None


def test_completion_logprobs_of_split_characters_stay_apart_and_in_place() -> None:
    assert CompletionLogprobs(VOCABULARY.__getitem__).take((*ROCKET, ITEMS[0])) == {
        "tokens": [r"bytes:\xf0\x9f", r"bytes:\x9a\x80", "!", "he"],
        "token_logprobs": [-0.5, -0.25, -0.125, -0.5],
        "top_logprobs": [{r"bytes:\xf0\x9f": -0.5, r"bytes:\x9a\x80": -1.5}, {}, {}, {"he": -0.5, "ü": -1.5}],
        "text_offset": [0, 0, 1, 2],
    }


def test_completion_logprobs_are_the_same_token_by_token() -> None:
    together: Any = CompletionLogprobs(VOCABULARY.__getitem__).take(ROCKET)
    one_by_one = CompletionLogprobs(VOCABULARY.__getitem__)
    parts: list[Any] = [one_by_one.take((item,)) for item in ROCKET]
    assert together == {name: [value for part in parts for value in part[name]] for name in together}
