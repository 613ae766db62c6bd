"""Constrains decoding to a JSON schema: which tokens may come next. Compiled by llguidance."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from engine.errors import GrammarError
from engine.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 64 * 1024
MAX_CACHED_GRAMMARS = 64
MAX_LEXER_STATES = 20_000  # 1-2 kB each
MAX_GRAMMAR_SYMBOLS = 100_000
MAX_ITEMS_IN_ROW = 2_000
MAX_ITEMS_IN_STEP = 50_000
# llguidance's unit of work on regular expressions; about 50,000 (compiling) and 14,000 (stepping) a millisecond.
COMPILE_FUEL = 1_000_000
STEP_FUEL = 200_000

# One way to write white space: a model that may add more of it sometimes never stops. These separators
# are those of most JSON in training data. They also override `x-guidance` in a caller's schema.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": True,
}


class GrammarCompiler:
    """Compiles schemas for one tokenizer and keeps the most recently used."""

    def __init__(self, tokenizer: Tokenizer, *, max_cached: int = MAX_CACHED_GRAMMARS) -> None:
        self._tokenizer = tokenizer
        self._max_cached = max_cached
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def warm_up(self) -> None:
        """Prepare the vocabulary now (0.2-1 s) and not at the first request."""
        _ = self._vocabulary

    def compile(self, schema: str) -> Grammar:
        """A fresh grammar at its beginning.

        Args:
            schema: JSON Schema text, an object. Keywords that llguidance does not know are refused.

        Raises:
            GrammarError: Too long, not JSON, or not a schema that can be compiled within the limits.
        """
        matcher = self._compiled.get(schema)
        if matcher is None:
            matcher = self._compiled[schema] = self._matcher(schema)
            if len(self._compiled) > self._max_cached:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(schema)
        return Grammar(matcher.deep_copy(), self._tokenizer.vocab_size)

    def _matcher(self, schema: str) -> LLMatcher:
        if len(schema.encode(errors="surrogatepass")) > MAX_SCHEMA_BYTES:
            raise GrammarError(f"the JSON schema is longer than {MAX_SCHEMA_BYTES} bytes")
        try:
            if not isinstance(json.loads(schema), dict):
                raise GrammarError("the JSON schema is not a JSON object")
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema is not valid JSON: {error}") from None
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(f"the JSON schema cannot be compiled: {_first_line(matcher.get_error())}")
        return matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        eos_token_ids = sorted(
            self._tokenizer.eos_token_ids, key=lambda item: item != self._tokenizer.main_eos_token_id
        )
        return LLTokenizer(
            self._tokenizer.to_json(),
            n_vocab=self._tokenizer.vocab_size,
            eos_token=eos_token_ids,
            slices=LLTokenizer.json_slices(),
        )


class Grammar:
    """One request's place in its grammar. Dead after the first `GrammarError`. One thread at a time."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self.has_mask = False  # what `mask` returns is already computed

    @property
    def is_accepting(self) -> bool:
        """True where the text so far is complete, even if more may follow."""
        return bool(self._matcher.is_accepting())

    @property
    def is_terminated(self) -> bool:
        """True where only an end-of-sequence token may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def compute_mask(self) -> None:
        """Do now what `mask` would have to. A failure is told there."""
        if not self.has_mask and not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            self.has_mask = True

    def mask(self) -> NDArray[np.int32]:
        """Which ids may come next: bit i, from the least significant of the first word, stands for id i.

        An end-of-sequence token is among them where the text is complete. The array is valid until `consume`.

        Raises:
            GrammarError: An earlier token does not fit, a limit is exceeded, or nothing may follow.
        """
        if not self.has_mask and self._matcher.is_error():
            raise GrammarError("an earlier token does not fit the JSON schema")
        self.compute_mask()
        if self._matcher.is_error():
            raise GrammarError(f"the JSON schema constraint failed: {_first_line(self._matcher.get_error())}")
        if not self._bits.any():
            raise GrammarError("no token fits the JSON schema here")
        return self._bits

    def consume(self, token_id: int) -> None:
        """Move on by one token. End tokens may be repeated.

        Raises:
            GrammarError: The token is not allowed here, or a limit is exceeded.
        """
        self.has_mask = False
        if not self._matcher.consume_token(token_id):
            # llguidance's own message quotes the token, which may be a patient's name.
            raise GrammarError(f"token {token_id} does not fit the JSON schema")


class MaskWorker:
    """One thread that computes masks while its owner waits for something else.

    From `start` to the end of the next `wait` the grammars are the worker's; nobody else may touch them. One batch
    at a time. The thread starts with the first batch and ends with `close` or with the last reference.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._is_closed = False

    def start(self, grammars: Sequence[Grammar]) -> None:
        """Compute the masks that are not ready. Waits for the batch before."""
        self.wait()
        missing = [grammar for grammar in grammars if not grammar.has_mask]
        if not missing or self._is_closed:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._running = self._executor.submit(_compute_masks, missing)

    def wait(self) -> None:
        """Return when no batch is being computed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Finish the batch and end the thread. Idempotent; nothing is computed here from then on."""
        self._is_closed = True
        if self._executor is not None:
            self._executor.shutdown()


def _compute_masks(grammars: Sequence[Grammar]) -> None:
    for grammar in grammars:
        grammar.compute_mask()


def _first_line(message: str) -> str:
    return message.partition("\n")[0]


def _limits() -> LLParserLimits:
    # Verbose errors quote the text generated so far, which must not reach a log.
    return LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=MAX_ITEMS_IN_STEP,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )
