"""Tokens -> text, piece by piece. The law: whatever the pieces are, together they are what one decode gives."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmasos.blocks.registry import load_tokenizer, resolve
from llmasos.client.text import REPLACEMENT, Detokenizer, StopText


class ByteTokenizer:
    """A token is a byte: every character beyond ASCII is split, as emoji are by the real ones."""

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")


class PieceTokenizer:
    """Tokens are words that carry the space before them, and the first one of a text loses it, as in SentencePiece."""

    WORDS = ("▁The", "▁world", "▁is", "▁small", ".", "ly", "▁")

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(self.WORDS[token] for token in ids).replace("▁", " ").removeprefix(" ")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_tokenizer(resolve("smollm2"))


def pieces_of(tokenizer: Any, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


# --- pieces ---------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20))
def test_bytes_become_the_text(text: str) -> None:
    data = text.encode(errors="replace")
    pieces = pieces_of(ByteTokenizer(), data)
    assert "".join(pieces) == data.decode()
    assert not any(REPLACEMENT in piece for piece in pieces if REPLACEMENT not in text)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces_of(ByteTokenizer(), "aé👋".encode()) == ["a", "", "é", "", "", "", "👋", ""]


@given(st.lists(st.integers(0, 255), max_size=12))
@example([0xF0, 0x9F, 0x91])  # a text that ends within a character
@example([0xFF, 0x41])  # a byte that is in no character
def test_any_bytes_give_what_one_decode_gives(data: list[int]) -> None:
    assert "".join(pieces_of(ByteTokenizer(), data)) == ByteTokenizer().decode(data)


@given(st.lists(st.integers(0, 6), max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_spaces_are_those_behind_the_prompt(ids: list[int], prompt: list[int]) -> None:
    tokenizer = PieceTokenizer()
    whole = tokenizer.decode([*prompt, *ids])
    assert "".join(pieces_of(tokenizer, ids, prompt)) == whole.removeprefix(tokenizer.decode(prompt))


TEXTS = [
    "The world is a small place.",
    "Wave 👋🏽, family 👨‍👩‍👧‍👦, flag 🇳🇿 — and naïve café.",
    "日本語の文章です。한국어도.",
    "def f(x):\n\treturn  x   # done\r\n",
    "  leading and trailing  ",
    "🙂" * 20,
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_real_tokenizer_gives_the_text_back(smollm2: Any, text: str) -> None:
    pieces = pieces_of(smollm2, smollm2(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_an_emoji_of_several_tokens_comes_whole(smollm2: Any) -> None:
    ids = smollm2("Hi 👋🏽!")["input_ids"]
    assert len(ids) > 5  # else this is no test
    pieces = [piece for piece in pieces_of(smollm2, ids) if piece]
    assert pieces[0] == "Hi"
    assert pieces[-1] == "!"
    assert all(piece.encode().decode() == piece and REPLACEMENT not in piece for piece in pieces)


@given(data=st.data())
def test_any_tokens_give_what_one_decode_gives(smollm2: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 49_151), max_size=30))
    whole = smollm2.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(smollm2, ids)) == whole


def test_special_tokens_are_not_text(smollm2: Any) -> None:
    [end] = resolve("smollm2").eos_token_ids
    ids = smollm2(" Bye")["input_ids"]
    assert "".join(pieces_of(smollm2, [*ids, end])) == " Bye"


# --- stop texts -----------------------------------------------------------------------------------------------------


def run_with_stop(text: str, stop: Sequence[str]) -> tuple[list[str], StopText]:
    """Feed characters one by one until stopped."""
    state = StopText(Detokenizer(ByteTokenizer(), ()), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(state.add(byte))
        if state.stopped:
            break
    pieces.append(state.finish())
    return pieces, state


def test_the_text_ends_before_the_stop_text() -> None:
    pieces, state = run_with_stop("one\n\ntwo", ["\n\n"])
    assert pieces == ["o", "n", "e", "", "", ""]
    assert (state.text, state.stopped) == ("one", True)


def test_what_only_began_like_a_stop_text_is_given_out() -> None:
    pieces, state = run_with_stop("one\ntwo\n", ["\n\n"])
    assert pieces == ["o", "n", "e", "", "\nt", "w", "o", "", "\n"]
    assert (state.text, state.stopped) == ("one\ntwo\n", False)


def test_the_first_of_several_counts() -> None:
    _, state = run_with_stop("a stop or END", ["END", "stop"])
    assert state.text == "a "


def test_a_stop_text_that_overlaps_itself() -> None:
    _, state = run_with_stop("aaaab", ["aab"])
    assert (state.text, state.stopped) == ("aa", True)


def test_a_stop_text_within_one_token() -> None:
    class Words:
        def decode(self, ids: Sequence[int], **_: object) -> str:
            return "".join(("yes. No", " more")[token] for token in ids)

    state = StopText(Detokenizer(Words(), ()), ["."])
    assert state.add(0) == "yes"
    assert state.stopped
    assert state.finish() == ""


ab = st.text("ab", min_size=1, max_size=4)


@given(st.text("ab", max_size=14), st.lists(ab, max_size=3))
def test_nothing_of_a_stop_text_and_everything_before_it(text: str, stop: list[str]) -> None:
    pieces, state = run_with_stop(text, stop)
    assert "".join(pieces) == state.text
    ends = [at + len(word) for word in stop if (at := text.find(word)) >= 0]
    assert state.stopped == bool(ends)
    if not ends:
        assert state.text == text
        return
    seen = text[: min(ends)]  # what had been fed when the first stop text was complete
    assert state.text == seen[: min(seen.find(word) for word in stop if word in seen)]
    assert not any(word in state.text for word in stop)
