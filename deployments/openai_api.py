"""OpenAI-compatible bodies: what is accepted, and how answers are shaped. No engine, no Ray."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deployments.errors import BadRequest
from deployments.messages import TokenLogprob
from engine.request import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, SamplingParams

MAX_CHOICES = 8
MAX_MESSAGES = 1024
MAX_TEMPERATURE = 2.0
DEFAULT_COMPLETION_TOKENS = 16
# Parameters that name a cache partition or a KV transfer: the zone comes from the credential alone.
ZONE_PARAMETERS = ("zone", "trust_zone")
STRIPPED_PARAMETERS = ("cache_salt", "extra_key", "kv_transfer_params", *ZONE_PARAMETERS)

TokenBytes = Callable[[int], bytes]
"""UTF-8 bytes of a token id, perhaps of a part of a character."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(_Body):
    include_usage: bool = False


class JsonSchema(_Body):
    name: str = Field(default="schema", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Generation(_Body):
    """Parameters both endpoints take. Those OpenAI does not have carry vLLM's names."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, max_length=256)
    metadata: dict[str, str] | None = None
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOP_STRINGS or not all(stops):
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings, none empty")
        return stop

    def sampling(self, max_tokens: int, seed: int, logprobs: int | None) -> SamplingParams:
        """Engine parameters for one choice.

        Raises:
            BadRequest: A combination the engine refuses.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                seed=seed,
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
                json_schema=self._schema_text(),
            )
        except ValueError as error:
            raise BadRequest(str(error)) from error

    def _schema_text(self) -> str | None:
        chosen = self.response_format
        if chosen is None or chosen.type == "text":
            return None
        if chosen.type == "json_object":
            return '{"type":"object"}'
        if chosen.json_schema is None:
            raise BadRequest("response_format json_schema needs json_schema", param="response_format")
        try:
            return json.dumps(chosen.json_schema.schema_, allow_nan=False)
        except (ValueError, RecursionError) as error:
            raise BadRequest(
                "the schema is nested too deeply or holds a number out of range", param="response_format"
            ) from error


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | list[TextPart]
    name: str | None = Field(default=None, max_length=64)

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    prompt: str | list[int] | list[str]
    echo: Literal[False] = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: str | list[int] | list[str]) -> str | list[int] | list[str]:
        if not prompt:
            raise ValueError("the prompt must not be empty")
        if isinstance(prompt[0], str) and not isinstance(prompt, str) and len(prompt) != 1:
            raise ValueError("one prompt a request")
        return prompt

    @property
    def text(self) -> str | None:
        """None for a prompt of token ids."""
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return prompt if isinstance(prompt, str) else None

    @property
    def token_limit(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def strip_client_parameters(document: dict[str, Any]) -> dict[str, Any]:
    """Remove what a client may not decide; returns what was there, by name."""
    return {name: document.pop(name) for name in STRIPPED_PARAMETERS if name in document}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, object]:
    """`cached_tokens` None: not told."""
    counts: dict[str, object] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return counts if cached_tokens is None else counts | {"prompt_tokens_details": {"cached_tokens": cached_tokens}}


def chat_logprobs(items: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, object] | None:
    """`bytes` are the token's own, also where it is only a part of a character."""
    if not items:
        return None
    return {
        "content": [
            {
                "token": item.text,
                "logprob": item.logprob,
                "bytes": list(token_bytes(item.token_id)),
                "top_logprobs": [
                    {"token": text, "logprob": value, "bytes": list(token_bytes(token_id))}
                    for token_id, text, value in item.top
                ],
            }
            for item in items
        ]
    }


class CompletionLogprobs:
    """The logprobs of one choice's tokens, as they come. A part of a character is written `bytes:\\xf0\\x9f`.

    `text_offset` counts characters of the answer up to the token, whether or not their text is already out.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def take(self, items: Sequence[TokenLogprob]) -> dict[str, object] | None:
        if not items:
            return None
        return {
            "tokens": [self._spelled(item.token_id, item.text) for item in items],
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [
                {self._spelled(token_id, text): value for token_id, text, value in item.top} for item in items
            ],
            "text_offset": [self._advance(item.token_id) for item in items],
        }

    def _spelled(self, token_id: int, text: str) -> str:
        data = self._token_bytes(token_id)
        try:
            data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return text

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(self._token_bytes(token_id)))
        return offset
