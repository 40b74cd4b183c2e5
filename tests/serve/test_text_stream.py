"""Pieces of text: together the whole, each of whole characters, and no part of a stop text among them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.serve.text_stream import StopMatcher, TextStream

BYTES = ByteTokenizer()


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.flush()]


@given(st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_character_of_several_tokens_comes_whole(text: str):
    ids = [*text.encode("utf-8", errors="replace")]
    got = pieces(BYTES, ids)
    assert "".join(got) == BYTES.decode(ids)
    assert got[-1] == "\ufffd" if text.endswith("\ufffd") else not got[-1]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@given(
    st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 258, 263]), max_size=20)
)
@settings(max_examples=300, deadline=None)
def test_broken_bytes_give_the_text_that_decoding_everything_gives(ids: list[int]):
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


def test_what_is_held_back_is_no_more_than_a_character():
    stream = TextStream(BYTES)
    assert [stream.push(i) for i in "€".encode()] == ["", "", "€"]
    shown = "".join(stream.push(0xFF) for _ in range(10))
    assert len(shown) == 7
    assert stream.flush() == "\ufffd" * 3


def test_spaces_survive_a_decoder_that_strips_the_first(tmp_path: pathlib.Path):
    """SentencePiece style: a word carries its space, and the decoder drops that of the first word."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "[U]": 3}, unk_token="[U]"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    assert pieces(tokenizer, [0, 1, 2, 1]) == ["a", " b", "c", " b", ""]


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4), st.lists(st.integers(1, 5), max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_stop_text_ends_the_text_before_it_however_it_is_cut(text: str, stop: str, sizes: list[int]):
    matcher, shown, start = StopMatcher([stop]), "", 0
    for size in [*sizes, len(text)]:
        more, has_stopped = matcher.push(text[start : start + size])
        shown, start = shown + more, start + size
        assert not has_stopped or stop in text[:start]
        if has_stopped:
            break
        assert stop not in text[:start]
        assert text[:start].startswith(shown)
        assert len(text[:start]) - len(shown) < len(stop)  # what cannot be its beginning is not held back
    else:
        shown += matcher.flush()
    assert shown == text.partition(stop)[0]


def test_the_first_of_several_stop_texts_counts():
    assert StopMatcher(["there", "o w"]).push("hello world there") == ("hell", True)
    assert StopMatcher([]).push("anything") == ("anything", False)


@pytest.mark.parametrize("text", ["", "a", "xyzw"])
def test_what_looked_like_a_stop_text_is_shown_at_the_end(text: str):
    matcher = StopMatcher(["xyzwv"])
    shown, _ = matcher.push(text)
    assert shown + matcher.flush() == text
