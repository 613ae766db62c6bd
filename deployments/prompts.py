"""From texts with zones to a tokenised prompt: rendered and tokenised once, each token in the join of what leads to it.

Whatever is generated lies in the zone of the last token, so that one is always as private as the call: a client may
put anything into an answer, by a schema for example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from deployments.generation import TokenisedPrompt
from deployments.trust.labelling import TextSpan, label_tokens, unlabelled, with_private_end
from engine.tokenizer import Tokenizer
from engine.zone import Zone


@dataclass(frozen=True, slots=True)
class ZonedText:
    text: str
    zone: Zone


@dataclass(frozen=True, slots=True)
class ZonedMessage:
    """One chat message; its content is the texts joined."""

    role: str
    texts: tuple[ZonedText, ...]

    @property
    def content(self) -> str:
        return "".join(text.text for text in self.texts)


def tokenise_chat(tokenizer: Tokenizer, messages: Sequence[ZonedMessage], private: Zone) -> TokenisedPrompt:
    """The template's own text takes the zone of what stands before it, at the beginning that of the first text.

    Where the template hides or moves about the contents, the whole prompt takes their join.

    Args:
        messages: At least one, each with at least one text.
        private: The zone of the call.
    """
    chat = tokenizer.encode_chat([{"role": message.role, "content": message.content} for message in messages])
    zones = [text.zone for message in messages for text in message.texts]
    whole = unlabelled(len(chat.token_ids), reduce(Zone.join, zones, private))
    if chat.spans is None or all(zone == whole[0].zone for zone in zones):
        return TokenisedPrompt(chat.token_ids, whole)
    spans: list[TextSpan] = []
    for message, content in zip(messages, chat.spans, strict=True):
        position = 0
        for text in message.texts:
            start, end = content.locate(position), content.locate(position + len(text.text))
            position += len(text.text)
            spans.append(TextSpan(start, end, text.zone))
    try:
        labelled = label_tokens(chat.offsets, spans, scaffold=zones[0])
    except ValueError:
        return TokenisedPrompt(chat.token_ids, whole)
    return TokenisedPrompt(chat.token_ids, with_private_end(labelled, private))


def one_text(token_ids: Sequence[int], zone: Zone, private: Zone) -> TokenisedPrompt:
    """A prompt of one text, as it is."""
    return TokenisedPrompt(tuple(token_ids), with_private_end(unlabelled(len(token_ids), zone), private))
