"""What a choice makes of its deltas where the service cannot be brought to show it."""

import json
import math

import numpy as np

from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.serve.choice import Choice, Piece, Token, echo, join
from magistral_jax.serve.engine_thread import Delta
from magistral_jax.serve.scoring import PromptScore

BYTES = ByteTokenizer()


def delta(text: bytes | list[int], finish=None) -> Delta:
    tokens = [*text]
    return Delta(0, tokens, [-0.5] * len(tokens), [3] * len(tokens), finish)


def test_the_stop_token_counts_and_has_no_text():
    choice = Choice(BYTES, [])
    pieces = [choice.feed(delta(b"ab")), choice.feed(delta([*b"c", 258], "stop"))]
    tokens = [Token(token, at, -0.5, version=3) for at, token in enumerate([*b"abc", 258])]
    assert join(pieces) == Piece("abc", tokens, "stop")


def test_a_cut_completion_shows_what_is_left_of_its_last_character():
    choice = Choice(BYTES, ["x"])
    assert choice.feed(delta("é".encode()[:1])).text == ""
    last = choice.feed(delta([0x80], "length"))
    assert (last.text, last.finish) == (BYTES.decode([0xC3, 0x80]), "length")
    cut = Choice(BYTES, []).feed(delta([*b"a", 0xE2, 0x82], "length"))
    assert cut.text == "a\ufffd"


def test_a_stop_text_drops_the_tokens_behind_it_but_not_its_own():
    choice = Choice(BYTES, ["STOP"], offset=10)
    assert choice.feed(delta(b"abST")).text == "ab"
    end = choice.feed(delta(b"OPxyz", "length"))
    assert (end.text, end.finish) == ("", "stop")
    assert [(token.id, token.offset) for token in end.tokens] == [(ord("O"), 14), (ord("P"), 15)]


def test_a_stop_text_that_does_not_come_is_shown_at_the_end():
    choice = Choice(BYTES, ["STOP"])
    assert choice.feed(delta(b"abST")).text == "ab"
    assert choice.feed(delta([258], "stop")) == Piece("ST", [Token(258, 4, -0.5, version=3)], "stop")


def test_log_probs_are_numbers_that_json_can_carry():
    piece = Choice(BYTES, []).feed(Delta(0, [65, 66], [-math.inf, math.nan], [0, 0]))
    assert [token.logprob for token in piece.tokens] == [-9999.0, None]
    values = np.asarray([-np.inf, np.nan], np.float32)
    score = PromptScore(0, values, np.zeros(2, np.int32), values)
    tokens = echo(BYTES, np.asarray([65, 66, 67], np.int32), "ABC", 0, score).tokens
    assert [token.logprob for token in tokens] == [None, -9999.0, None]
    json.dumps([token.best for token in tokens], allow_nan=False)
