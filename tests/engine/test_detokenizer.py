"""Detokenizer: what it emits, joined, is the decoded text cut at the first stop string, and nothing waits in vain."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.detokenizer import Detokenizer
from engine.tokenizer import Tokenizer
from tests.engine.test_tokenizer import byte_fallback_directory
from tests.engine.tiny_tokenizer import tiny_tokenizer

TEXT = "The claim 12: naïve café, 東京の病院 😀👩‍👩‍👧 done."


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte-level":
        return tiny_tokenizer()
    return Tokenizer.from_path(byte_fallback_directory(tmp_path_factory.mktemp("model")))


def bytewise_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte, so that every character of several bytes is split."""
    singles = {tokenizer.token_bytes(index): index for index in range(tokenizer.vocab_size)}
    return [singles[bytes([byte])] for byte in text.encode()]


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Oracle: the first end of a stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        matches = [string for string in stop if text[:end].endswith(string)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def test_pieces_of_random_ids_join_to_the_decoded_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(-1, tokenizer.vocab_size + 2) for _ in range(rng.randrange(40))]
        for skip in (True, False):
            pieces = run(Detokenizer(tokenizer, skip_special_tokens=skip), ids)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_with_its_last_byte_and_never_in_part(tokenizer: Tokenizer) -> None:
    ids = bytewise_ids(tokenizer, TEXT)
    detokenizer = Detokenizer(tokenizer)
    seen = ""
    for index, token_id in enumerate(ids):
        seen += detokenizer.push(token_id)
        assert seen == TEXT.encode()[: index + 1].decode(errors="ignore")
    assert seen == TEXT
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_marked_at_the_end(tokenizer: Tokenizer) -> None:
    ids = bytewise_ids(tokenizer, "a😀")[:-1]
    assert run(Detokenizer(tokenizer), ids)[-1] == "\ufffd"


def test_only_the_first_space_of_a_sentencepiece_text_is_dropped(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_path(byte_fallback_directory(tmp_path))
    ids = tokenizer.encode(" hello hello")
    assert "".join(run(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids) == " hello hello"


def test_text_before_a_stop_string_is_emitted_and_the_stop_string_is_not(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("END",))
    pieces = run(detokenizer, bytewise_ids(tokenizer, "abEENDcd"))
    assert "".join(pieces) == "abE"
    assert detokenizer.stopped_by == "END"
    assert detokenizer.push(5) == detokenizer.flush() == ""


def test_text_that_cannot_begin_a_stop_string_is_not_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("<end>", "\n\n"))
    pieces = [detokenizer.push(token_id) for token_id in bytewise_ids(tokenizer, "a<eb\nc<end")]
    assert pieces == ["a", "", "", "<eb", "", "\nc", "", "", "", ""]
    assert detokenizer.flush() == "<end"
    assert detokenizer.stopped_by is None


@pytest.mark.parametrize("bytewise", [True, False])
def test_any_stop_strings_cut_any_text_where_the_oracle_does(tokenizer: Tokenizer, bytewise: bool) -> None:
    rng = random.Random(2)
    for _ in range(400):
        text = "".join(rng.choices(["a", "b", "é", "😀"], weights=[4, 4, 1, 1], k=rng.randrange(20)))
        stop = tuple("".join(rng.choices("abé", k=rng.randint(1, 5))) for _ in range(rng.randrange(4)))
        ids = bytewise_ids(tokenizer, text) if bytewise else tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        detokenizer = Detokenizer(tokenizer, stop)
        expected, matched = cut_at_stop(decoded, stop)
        emitted = ""
        for position, token_id in enumerate(ids):
            emitted += detokenizer.push(token_id)
            if detokenizer.stopped_by is None:
                held = tokenizer.decode(ids[: position + 1]).rstrip("\ufffd")[len(emitted) :]
                assert not held or any(string.startswith(held) for string in stop), "held back without need"
        emitted += detokenizer.flush()
        assert (emitted, detokenizer.stopped_by) == (expected, matched), (text, stop)


def test_a_stop_string_is_found_across_tokens_as_in_one_piece() -> None:
    tokenizer = tiny_tokenizer()
    whole, split = Detokenizer(tokenizer, ("bc", "abcd")), Detokenizer(tokenizer, ("bc", "abcd"))
    assert "".join(run(split, bytewise_ids(tokenizer, "xabcd"))) == "xa"
    assert "".join(run(whole, tokenizer.encode("xabcd"))) == "xa"
    assert whole.stopped_by == split.stopped_by == "bc"


def test_the_text_of_the_first_min_tokens_is_not_searched() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, ("X",), min_tokens=2)
    assert "".join(run(detokenizer, bytewise_ids(tokenizer, "XXaXb"))) == "XXa"
    assert detokenizer.stopped_by == "X"


def test_work_does_not_grow_with_the_text() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, ("a" * 50 + "b",))
    for token_id in bytewise_ids(tokenizer, "a" * 5000):
        detokenizer.push(token_id)
        assert len(detokenizer._held) <= 50
