"""The language model as a reviewer sees it: prompt in, text out. The engine stands behind it, or a double."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from deployments.claims.prompt import LabelledPrompt


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What came back. `finish_reason` is `stop` for a whole answer; times in seconds from the call.

    `prompt_tokens_by_origin`: where their KV came from, and `shared` for those of which it is told to nobody;
    `pushed_bytes`: moved for the others. None where the caller is not to know.
    """

    text: str
    finish_reason: str
    usage: Usage = Usage()
    prompt_tokens_by_origin: Mapping[str, int] | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    pushed_bytes: int | None = None


class ReviewModel(Protocol):
    async def generate(
        self,
        prompt: LabelledPrompt,
        *,
        json_schema: Mapping[str, object] | None,
        max_tokens: int,
        request_id: str,
    ) -> Generation:
        """Generate under the schema, greedily. Any exception means that there is no answer."""
        ...
