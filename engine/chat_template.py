"""Renders chat messages through a model's jinja2 template and finds each content in the result.

Text only: what is encoded, and which parts may hold control tokens, is `engine.tokenizer`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, RequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_MESSAGES = 1024
MAX_NESTING = 32
TEXT_PART_SEPARATOR = "\n"

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ContentSpan:
    """Characters [start, end) of the rendered text that are one message's content.

    `num_stripped` counts the characters that the template cut from the content's beginning.
    """

    start: int
    end: int
    num_stripped: int = 0

    def locate(self, offset: int) -> int:
        """Position in the rendered text of the content's character `offset`; cut ones go to the near end."""
        return min(self.end, self.start + max(0, offset - self.num_stripped))


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered chat. `spans` has one entry a message; None where the contents cannot be told apart."""

    text: str
    spans: tuple[ContentSpan, ...] | None


class ChatTemplate:
    """One compiled template. The sandbox has what published templates use, and nothing else."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """
        Args:
            source: The template. `special_tokens`: its variables `bos_token`, `eos_token` and so on.
            now: Clock behind the template function `strftime_now`.

        Raises:
            CheckpointError: The template does not compile.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None) -> str:
        """Prompt text of `messages`.

        Raises:
            RequestError: Messages of the wrong form, or refused by the template. One sentence says why.
        """
        return self._render(_checked_messages(messages), add_generation_prompt, tools)

    def render_with_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None
    ) -> RenderedChat:
        """As `render`, with the place of every content.

        The template is rendered a second time with a unique marker for each content. The spans are
        trusted only if the literal text around the markers, with the contents put back (whole, or
        stripped of outer white space), is exactly the first rendering.
        """
        checked = _checked_messages(messages)
        text = self._render(checked, add_generation_prompt, tools)
        contents = [content if isinstance(content := item.get("content"), str) else "" for item in checked]
        stem = f"mark{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:24]}n"
        marked_messages = [
            {**item, "content": f"{stem}{index}e"} if contents[index] else item for index, item in enumerate(checked)
        ]
        try:
            marked = self._render(marked_messages, add_generation_prompt, tools)
        except RequestError:
            return RenderedChat(text, None)
        return RenderedChat(text, _align(text, contents, re.split(f"{stem}([0-9]+)e", marked)))

    def _render(self, messages: Sequence[dict[str, object]], add_generation_prompt: bool, tools: object) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None


def untrusted_strings(messages: Sequence[Message], tools: object = None) -> Iterator[str]:
    """Every string that the caller wrote besides roles and contents: names, tool calls, tools."""
    for message in messages:
        yield from _leaves({key: value for key, value in message.items() if key not in ("role", "content")})
    yield from _leaves(tools)


def _align(text: str, contents: Sequence[str], pieces: Sequence[str]) -> tuple[ContentSpan, ...] | None:
    """Spans from `pieces`: literal, index of a content, literal, ..., literal. None if they do not fit."""
    literals, order = pieces[0::2], [int(index) for index in pieces[1::2]]
    if sorted(order) != [index for index, content in enumerate(contents) if content]:
        return None
    spans: dict[int, ContentSpan] = {}
    position = len(literals[0])
    if not text.startswith(literals[0]):
        return None
    for index, literal in zip(order, literals[1:], strict=True):
        span = _fit(text, position, contents[index], literal)
        if span is None:
            return None
        spans[index] = span
        position = span.end + len(literal)
    if position != len(text):
        return None
    # An empty content covers no character, so any place is right for it.
    return tuple(spans.get(index, ContentSpan(0, 0)) for index in range(len(contents)))


def _fit(text: str, position: int, content: str, literal: str) -> ContentSpan | None:
    stripped = len(content) - len(content.lstrip())
    for form, cut in (
        (content, 0),
        (content.strip(), stripped),
        (content.lstrip(), stripped),
        (content.rstrip(), 0),
    ):
        end = position + len(form)
        if text.startswith(form, position) and text.startswith(literal, end):
            return ContentSpan(position, end, cut)
    return None


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    if not messages:
        raise RequestError("a chat needs at least one message")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"a chat has at most {MAX_MESSAGES} messages")
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: Message) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{index}] is not an object")
    # A role goes into the prompt beside control tokens, so it comes from a closed set.
    if message.get("role") not in ROLES:
        raise RequestError(f"messages[{index}].role is not one of {', '.join(sorted(ROLES))}")
    plain = {str(key): _plain(value, f"messages[{index}].{key}") for key, value in message.items()}
    if isinstance(plain.get("content"), list):
        plain["content"] = _joined_text(index, plain["content"])
    content = plain.get("content")
    if not isinstance(content, str) and not (content is None and plain.get("tool_calls")):
        raise RequestError(f"messages[{index}].content is neither text nor a list of text parts")
    return plain


def _joined_text(index: int, parts: Any) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f'messages[{index}].content may hold only parts {{"type": "text", "text": ...}}')
    return TEXT_PART_SEPARATOR.join(part["text"] for part in parts)


def _plain(value: object, where: str, depth: int = 0) -> object:
    """`value` rebuilt from JSON types, so that a template never meets an object with methods."""
    if depth > MAX_NESTING:
        raise RequestError(f"{where} is nested deeper than {MAX_NESTING} levels")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}, which is not a JSON value")


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes for HTML, which no prompt wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote; for a prompt its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
