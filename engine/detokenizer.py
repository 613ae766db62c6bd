"""Turns one request's token ids into text as they come: whole characters only, stop strings held back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.tokenizer import Tokenizer


class Detokenizer:
    """Incremental text of one request's output.

    All that `push` and `flush` return, joined, is `tokenizer.decode` of the ids pushed, cut before the
    first stop string. What is found does not depend on how the text is split into tokens: the stop
    string that ends first wins, the longest of those that end together. Constant time a character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """
        Args:
            stop: Stop strings, none empty.
            min_tokens: The text of the first so many tokens is not searched for stop strings.
        """
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.strips_leading_space
        self._searches = [_Search(string) for string in sorted(stop, key=len, reverse=True)]
        self._unsearched_tokens = min_tokens
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Text that has become safe to show: complete characters that no stop string can claim."""
        if self.stopped_by is not None:
            return ""
        data = b"" if token_id in self._hidden else self._tokenizer.token_bytes(token_id)
        text = self._without_first_space(self._decoder.decode(data))
        if self._unsearched_tokens > 0:
            self._unsearched_tokens -= 1
            return text
        return self._search(text)

    def flush(self) -> str:
        """The rest, once no token follows: a cut-off character as U+FFFD, and what was held back."""
        if self.stopped_by is not None:
            return ""
        text = self._search(self._without_first_space(self._decoder.decode(b"", final=True)))
        rest, self._held = self._held, ""  # a match has emptied it
        return text + rest

    def _without_first_space(self, text: str) -> str:
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def _search(self, text: str) -> str:
        if not self._searches:
            return text
        pending = self._held + text
        for index, char in enumerate(text):
            # Each search sees every character; a list, so that none is skipped once one has matched.
            matched = [search.string for search in self._searches if search.advance(char)]
            if matched:
                self.stopped_by = matched[0]
                self._held = ""
                end = len(pending) - len(text) + index + 1
                return pending[: end - len(matched[0])]
        num_held = max(search.num_matched for search in self._searches)
        safe = len(pending) - num_held
        self._held = pending[safe:]
        return pending[:safe]


class _Search:
    """Knuth-Morris-Pratt search for one string in a stream of characters."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        self._fallback = [0] * len(string)
        length = 0
        for index in range(1, len(string)):
            while length and string[index] != string[length]:
                length = self._fallback[length - 1]
            length += string[index] == string[length]
            self._fallback[index] = length

    def advance(self, char: str) -> bool:
        """Take one more character; True where the whole string has just been seen."""
        while self.num_matched and char != self.string[self.num_matched]:
            self.num_matched = self._fallback[self.num_matched - 1]
        self.num_matched += char == self.string[self.num_matched]
        return self.num_matched == len(self.string)
