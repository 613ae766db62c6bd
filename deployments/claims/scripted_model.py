"""A `ReviewModel` without a model, for tests and dry runs: answers by walking the schema, or misbehaves as scripted."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from random import Random
from typing import Any, Literal

from deployments.claims.prompt import LabelledPrompt
from deployments.claims.review_model import Generation, Usage

Behaviour = Literal["answer", "garbage", "cut", "raise", "hang", "invented"]

_WORDS = ("the", "line", "shows", "units", "above", "limit", "for", "this", "code", "and", "records", "would", "tell")
_LENGTHS = re.compile(r"\{(\d+),(\d+)\}")


class ScriptedReviewModel:
    """Implements `ReviewModel`. Each call takes the next behaviour of `script`, over and over.

    answer: valid under the schema, drawn from `seed` and the prompt. garbage: no JSON. cut: half an answer,
    finish reason `length`. raise: RuntimeError. hang: never returns. invented: an answer that cites flag F99.
    """

    def __init__(self, script: Sequence[Behaviour] = ("answer",), *, seed: int = 0) -> None:
        self._script: Iterator[Behaviour] = cycle(script)
        self._seed = seed
        self.prompts: list[LabelledPrompt] = []
        self.request_ids: list[str] = []
        self.max_tokens: list[int] = []

    async def generate(
        self,
        prompt: LabelledPrompt,
        *,
        json_schema: Mapping[str, object] | None,
        max_tokens: int,
        request_id: str,
    ) -> Generation:
        self.prompts.append(prompt)
        self.request_ids.append(request_id)
        self.max_tokens.append(max_tokens)
        behaviour = next(self._script)
        if behaviour == "raise":
            raise RuntimeError("scripted failure")
        if behaviour == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        rng = Random(f"{self._seed} {prompt.digest}")  # noqa: S311 - a double's choices, not secrets
        text = json.dumps(value_of(json_schema, rng)) if json_schema is not None else "Reviewed."
        reason = "stop"
        if behaviour == "garbage":
            text = "Sure! Here is the review: {risk"
        elif behaviour == "cut":
            text, reason = text[: len(text) // 2], "length"
        elif behaviour == "invented":
            text = text.replace('"F1"', '"F99"').replace('"risk": "', '"risk": "very ')
        words = len(prompt.system.split()) + len(prompt.user.split())
        return Generation(
            text=text,
            finish_reason=reason,
            usage=Usage(words, min(max_tokens, len(text.split()))),
            prompt_tokens_by_origin={"prefill_computed": words},
            ttft_s=0.0,
            e2e_s=0.0,
        )


def value_of(schema: Any, rng: Random) -> Any:
    """A random value that is valid under a schema of the kind that `answer_schema` builds.

    Raises:
        ValueError: The schema uses something else.
    """
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match schema.get("type"):
        case "object":
            return {name: value_of(schema["properties"][name], rng) for name in schema["required"]}
        case "array":
            return [value_of(item, rng) for item in schema["prefixItems"]]
        case "string":
            return _sentence(schema["pattern"], rng)
    raise ValueError(f"cannot walk {schema}")


def _sentence(pattern: str, rng: Random) -> str:
    found = _LENGTHS.search(pattern)
    if found is None:
        raise ValueError(f"cannot walk pattern {pattern}")
    least, most = int(found[1]), int(found[2])
    text = rng.choice(_WORDS).capitalize()
    while len(text) < least + 2 or (len(text) < most - 8 and rng.random() < 0.8):
        text += f" {rng.choice(_WORDS)}"
    return text[: most + 2].strip() + "."
