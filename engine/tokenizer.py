"""Text to token ids and back, from a GGUF file's metadata or a transformers directory.

Needs no network and no transformers. What a caller wrote is never read as a control token.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.chat_template import ChatTemplate, ContentSpan, Message, RenderedChat, untrusted_strings
from engine.errors import CheckpointError, RequestError

# Pre-tokenisers by `tokenizer.ggml.pre`. Each model's merges were learned on text cut up like this, and
# any other cut gives other ids without a word of warning: an unknown name is refused.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type

# Control tokens that end a turn or a text; a GGUF names one of a model's two or three.
_END_TOKENS = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>"}
)
_SPECIAL_TOKEN_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class ChatEncoding:
    """A chat as token ids. `offsets[i]` are the characters [start, end) of `text` behind token i."""

    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    text: str
    spans: tuple[ContentSpan, ...] | None


class Tokenizer:
    """Byte-level or byte-fallback tokenizer. Immutable; encoding may run in several threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Sequence[int],
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
        num_ids: int = 0,
        unused_ids: frozenset[int] = frozenset(),
    ) -> None:
        """
        Args:
            backend: Owned from here on.
            eos_token_ids: The main one first.
            special_tokens: Variables of the chat template (`bos_token`, `eos_token`, ...).
            frame: Ids put before and after a text when `encode` is asked for special tokens.
            num_ids: Lower bound of `vocab_size`. `unused_ids`: ids that stand for no text.

        Raises:
            CheckpointError: No end-of-sequence token, an unknown decoder, a template that fails to compile.
        """
        if not eos_token_ids:
            raise CheckpointError("the tokenizer names no end-of-sequence token")
        self._prefix_ids, self._suffix_ids = frame
        # A post-processor would trim leading spaces from the offsets; what else it does is in `frame`.
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added = dict(backend.get_added_tokens_decoder())
        self._special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._unused_ids = unused_ids
        self._is_byte_level, self._strips_leading_space = _decoder_form(backend)
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size = max(num_ids, highest + 1)
        self._token_bytes: list[bytes | None] = [None] * self.vocab_size
        self.main_eos_token_id = eos_token_ids[0]
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template
        self._template = ChatTemplate(chat_template, special_tokens or {}) if chat_template is not None else None

    @staticmethod
    def from_path(path: Path) -> Tokenizer:
        """Tokenizer of a `.gguf` file or of a directory with `tokenizer.json`.

        Raises:
            CheckpointError: Missing, damaged, or of a kind that is not supported; names file and fault.
        """
        if path.is_dir():
            return _located(path, _from_directory, path)
        # The reader shares a module with the tensors, and so brings torch: a directory needs neither.
        from engine.checkpoint.gguf import read_metadata

        return Tokenizer.from_gguf_metadata(read_metadata(path), path)

    @staticmethod
    def from_gguf_metadata(metadata: Mapping[str, object], path: Path) -> Tokenizer:
        """As `from_path`, from metadata that has been read; `path` is for messages."""
        return _located(path, _from_gguf_metadata, metadata)

    def warm_up(self) -> None:
        """Do now (0.3 s) what the first text with a spelled-out control token would wait for."""
        _ = self._plain_backend

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides which ids a text becomes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Control tokens: never part of the visible text."""
        return self._special_ids

    @property
    def strips_leading_space(self) -> bool:
        """True where the first space of a decoded text is an artefact of the vocabulary."""
        return self._strips_leading_space

    def to_json(self) -> str:
        """The `tokenizer.json` form, which other libraries load."""
        return str(self._backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special_tokens: Add the model's frame (a BOS token, say).
            parse_special: Read control tokens that are spelled out in `text`. False for text that
                comes from outside; a spelled-out token is then encoded like any other text.

        Raises:
            RequestError: `text` is not valid Unicode, or has no encoding as plain text.
        """
        ids = self._encode(text).ids
        if not parse_special and not self._added.keys().isdisjoint(ids):
            ids = self._encode_plain(text).ids
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else list(ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) behind each. Tokens that share a character overlap.

        Raises:
            RequestError: `text` is not valid Unicode.
        """
        encoding = self._encode(text)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token are skipped, malformed UTF-8 becomes U+FFFD."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in hidden)
        text = data.decode("utf-8", errors="replace")
        return text[1:] if self._strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes (perhaps part of a character) that one token stands for; empty for no token."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        known = self._token_bytes[token_id]
        if known is None:
            known = self._token_bytes[token_id] = self._spell(token_id)
        return known

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None
    ) -> str:
        """Prompt text of a chat.

        Raises:
            RequestError: The model has no chat template, or the messages do not fit it.
        """
        return self._chat_template().render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def render_chat_with_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None
    ) -> RenderedChat:
        """As `render_chat`, with the characters of each message's content (see `RenderedChat`)."""
        return self._chat_template().render_with_spans(
            messages, add_generation_prompt=add_generation_prompt, tools=tools
        )

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None
    ) -> ChatEncoding:
        """Ids of a chat in which only the template can write control tokens.

        Ids are those of the rendered text, as transformers gives them, unless a content spells out a
        control token: then that content is encoded as plain text.

        Raises:
            RequestError: As `render_chat`; or a control token is spelled out where it cannot be told
                from the template's own (a tool call, a template that hides where contents go).
        """
        for string in untrusted_strings(messages, tools):
            self._refuse_control_tokens(string)
        chat = self.render_chat_with_spans(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        if chat.spans is None:
            for string in _content_strings(messages):
                self._refuse_control_tokens(string)
        encoding = self._encode(chat.text)
        ids, offsets = encoding.ids, encoding.offsets
        if chat.spans is not None and self._is_forged(ids, offsets, chat.spans):
            ids, offsets = self._encode_guarded(chat.text, chat.spans)
        return ChatEncoding(tuple(ids), tuple(offsets), chat.text, chat.spans)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise RequestError("this model has no chat template")
        return self._template

    def _encode(self, text: str, backend: Backend | None = None) -> Any:
        try:
            return (backend or self._backend).encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError):
            raise RequestError("the text holds a lone surrogate, which is not valid Unicode") from None

    def _encode_plain(self, text: str) -> Any:
        encoding = self._encode(text, self._plain_backend)
        if not self._special_ids.isdisjoint(encoding.ids):
            raise RequestError("the text spells out a control token that has no encoding as plain text")
        return encoding

    @cached_property
    def _plain_backend(self) -> Backend:
        """The same vocabulary without the added tokens. Built once somebody spells one out."""
        form = json.loads(self.to_json())
        form["added_tokens"] = []
        model = form["model"]
        if model["type"] == "BPE":
            merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model["merges"]}
            kept = merged | {model.get("unk_token")}
            for token in self._added.values():
                if token.content not in kept:
                    model["vocab"].pop(token.content, None)
        return Backend.from_str(json.dumps(form))

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        contents = sorted((token.content for token in self._added.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    def _is_forged(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[ContentSpan]) -> bool:
        """True where an added token reaches into a content."""
        filled = sorted((span.start, span.end) for span in spans if span.start < span.end)
        starts = [start for start, _ in filled]
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            if token_id in self._added:
                before = bisect.bisect_left(starts, end) - 1
                if before >= 0 and filled[before][1] > start:
                    return True
        return False

    def _encode_guarded(self, text: str, spans: Sequence[ContentSpan]) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode with added tokens read between the contents only."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for start, end, token_id in (*self._scaffold_tokens(text, spans), (len(text), len(text), -1)):
            plain = self._encode_plain(text[position:start])
            ids += plain.ids
            offsets += [(position + first, position + last) for first, last in plain.offsets]
            if token_id >= 0:
                ids.append(token_id)
                offsets.append((start, end))
            position = end
        return ids, offsets

    def _scaffold_tokens(self, text: str, spans: Sequence[ContentSpan]) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of the added tokens outside the contents, with the white space they swallow."""
        ids = {token.content: token_id for token_id, token in self._added.items()}
        for low, high in _gaps(spans, len(text)):
            gap = text[low:high]
            floor = 0
            for match in self._added_pattern.finditer(gap):
                token = self._added[ids[match[0]]]
                start, end = match.span()
                if token.lstrip:
                    start = max(floor, len(gap[:start].rstrip()))
                if token.rstrip:
                    end = len(gap) - len(gap[end:].lstrip())
                floor = end
                yield low + start, low + end, ids[match[0]]

    def _refuse_control_tokens(self, string: str) -> None:
        if not self._added.keys().isdisjoint(self._encode(string).ids):
            raise RequestError("the chat spells out a control token of the model where it cannot be made harmless")

    def _spell(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode()
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._unused_ids:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTE_OF_CHAR.get(char) or char.encode() for char in token)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        return str(token).replace(_SPACE_MARK, " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """Character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    table.update({chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_alphabet()


def _located(path: Path, build: Any, source: object) -> Tokenizer:
    try:
        tokenizer: Tokenizer = build(source)
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    return tokenizer


def _from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise CheckpointError(f"tokenizer model {model!r} is not supported ('gpt2' is)")
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(f"pre-tokeniser {pre!r} is not one of {', '.join(_PRE_TOKENIZERS)}")
    tokens = _string_list(metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError("tokenizer.ggml.token_type does not match the list of tokens")
    backend = _byte_level_backend(tokens, _string_list(metadata, "tokenizer.ggml.merges"), str(pre))
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {name: _token_id(metadata, f"tokenizer.ggml.{key}", tokens) for name, key in _SPECIAL_TOKEN_IDS.items()}
    bos_token_id = ids["bos_token"]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    prefix_ids = [bos_token_id] if adds_bos and bos_token_id is not None else []
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        eos_token_ids=_gguf_eos_token_ids(metadata, tokens, kinds),
        bos_token_id=bos_token_id,
        chat_template=template if isinstance(template, str) else None,
        special_tokens={name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        frame=(prefix_ids, ()),
        num_ids=len(tokens),
        unused_ids=frozenset(index for index, kind in enumerate(kinds) if kind == _UNUSED),
    )


def _byte_level_backend(tokens: Sequence[str], merges: Sequence[str], pre: str) -> Backend:
    if any(merge.count(" ") != 1 for merge in merges):
        raise CheckpointError("tokenizer.ggml.merges holds an entry that is not a pair")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens lists a token twice")
    try:
        backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the binding raises plain Exception
        raise CheckpointError(f"the vocabulary and the merges do not fit: {error}") from None
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _pre_tokenizer(pre: str) -> Any:
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    pattern = _LLAMA3_SPLIT if pre == "llama-bpe" else _QWEN2_SPLIT
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gguf_eos_token_ids(metadata: Mapping[str, object], tokens: Sequence[str], kinds: Sequence[int]) -> tuple[int, ...]:
    named = [_token_id(metadata, f"tokenizer.ggml.{key}_token_id", tokens) for key in ("eos", "eot", "eom")]
    known = [index for index, kind in enumerate(kinds) if kind == _CONTROL and tokens[index] in _END_TOKENS]
    return tuple(dict.fromkeys(token_id for token_id in (*named, *known) if token_id is not None))


def _token_id(metadata: Mapping[str, object], key: str, tokens: Sequence[str]) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(tokens):
        raise CheckpointError(f"{key} is {value!r}, and there are {len(tokens)} tokens")
    return value


def _string_list(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{key} is not a list of strings")
    return value


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError("there is no tokenizer.json (a slow-only tokenizer is not supported)")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the binding raises plain Exception
        raise CheckpointError(f"{file}: {error}") from None
    config = _json_object(path / "tokenizer_config.json")
    special = {name: _content(config[name]) for name in _SPECIAL_TOKEN_IDS if config.get(name) is not None}
    bos_token = special.get("bos_token")
    return Tokenizer(
        backend,
        eos_token_ids=_directory_eos_token_ids(path, backend, special.get("eos_token")),
        bos_token_id=backend.token_to_id(bos_token) if bos_token is not None else None,
        chat_template=_directory_chat_template(path, config),
        special_tokens=special,
        frame=_frame(backend),
    )


def _directory_eos_token_ids(path: Path, backend: Backend, eos_token: str | None) -> tuple[int, ...]:
    """generation_config.json overrides config.json, as in transformers; the tokenizer's own is added."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _json_object(path / name).get("eos_token_id")
        found = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
        if found:
            break
    own = backend.token_to_id(eos_token) if eos_token is not None else None
    return tuple(dict.fromkeys([*found, own] if own is not None else found))


def _directory_chat_template(path: Path, config: Mapping[str, object]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _frame(backend: Backend) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a text."""
    probe = "a"
    bare = backend.encode(probe, add_special_tokens=False).ids
    framed = backend.encode(probe, add_special_tokens=True).ids
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise CheckpointError("the post-processor of the tokenizer changes the text's own tokens")


def _decoder_form(backend: Backend) -> tuple[bool, bool]:
    """(is byte-level, drops the first space) of the decoder.

    Raises:
        CheckpointError: Neither a byte-level nor a byte-fallback decoder.
    """
    form = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = form.get("decoders", [form])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds or any(step.get("content") == " " for step in steps if step.get("type") == "Replace"):
        strips = any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
        prepends = any(step.get("prepend_scheme", "never") != "never" for step in steps)
        return False, strips or prepends
    raise CheckpointError(f"a tokenizer with decoder {sorted(map(str, kinds))} is not supported")


def _json_object(file: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value


def _content(token: object) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _content_strings(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list | tuple):
            yield from (part["text"] for part in content if isinstance(part.get("text"), str))


def _gaps(spans: Sequence[ContentSpan], length: int) -> Iterator[tuple[int, int]]:
    position = 0
    for start, end in sorted((span.start, span.end) for span in spans if span.start < span.end):
        yield position, start
        position = end
    yield position, length
