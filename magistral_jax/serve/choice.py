"""One completion on its way to a client; in: deltas of the engine, out: pieces of text with their tokens."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from magistral_jax.data.tokenizer import Tokenizer
from magistral_jax.serve.engine_thread import Delta
from magistral_jax.serve.scoring import PromptScore
from magistral_jax.serve.text_stream import StopMatcher, TextStream

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a prompt (`version` is None) or of a completion.

    `logprob` is None where nothing comes before it, nobody asked, or the weights gave no number; `best` are the most
    probable tokens in its place, as far as they are known. `offset` counts characters from the beginning of the
    choice's text.
    """

    id: int
    offset: int
    logprob: float | None
    best: tuple[tuple[int, float | None], ...] = ()
    version: int | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of a choice, and the tokens that were sampled with it (their own text may still be held back)."""

    text: str
    tokens: list[Token]
    finish: Finish | None = None

    @property
    def completion(self) -> list[Token]:
        """The tokens that were sampled."""
        return [token for token in self.tokens if token.version is not None]


def as_number(logprob: float) -> float | None:
    """A log-prob as JSON can carry it: -9999 for impossible, as OpenAI has it, and None for NaN."""
    return None if math.isnan(logprob) else max(logprob, -9999.0)


def join(pieces: Sequence[Piece]) -> Piece:
    """Several pieces of one choice as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish if pieces else None,
    )


class Choice:
    """Turns deltas into pieces.

    Args:
      tokenizer: Of the model.
      stops: Texts that end the completion and are not shown.
      offset: Characters of the prompt, where it is echoed.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], offset: int = 0) -> None:
        self._text = TextStream(tokenizer)
        self._stops = StopMatcher(stops)
        self._offset = offset

    def feed(self, delta: Delta) -> Piece:
        """What a delta adds. A stop text ends the choice at the token that completes it; the rest is dropped."""
        shown: list[str] = []
        tokens: list[Token] = []
        for index, (token, logprob, version) in enumerate(
            zip(delta.tokens, delta.logprobs, delta.versions, strict=True)
        ):
            is_last = index == len(delta.tokens) - 1
            places = delta.alternatives[index] if delta.alternatives else []
            best = tuple((other, as_number(its_logprob)) for other, its_logprob in places)
            tokens.append(Token(token, self._offset, as_number(logprob), best, version))
            # The stop token has no text of its own; a completion that was cut shows what its last character lacks.
            fresh = "" if is_last and delta.finish == "stop" else self._text.push(token)
            if is_last and delta.finish is not None:
                fresh += self._text.flush()
            self._offset += len(fresh)
            text, has_stopped = self._stops.push(fresh)
            shown.append(text)
            if has_stopped:
                return Piece("".join(shown), tokens, "stop")
        if delta.finish is not None:
            shown.append(self._stops.flush())
        return Piece("".join(shown), tokens, delta.finish)


def echo(
    tokenizer: Tokenizer, token_ids: Int32[np.ndarray, " T"], text: str, num_added: int, score: PromptScore | None
) -> Piece:
    """The prompt as the first piece of a choice.

    Args:
      tokenizer: Of the model.
      token_ids: The prompt.
      text: The same as text.
      num_added: Tokens at its beginning that are not in the text.
      score: Its log-probs, where they are wanted.
    """
    stream, offset, tokens = TextStream(tokenizer), 0, []
    for index, token in enumerate(token_ids.tolist()):
        logprob, best = None, ()
        if score is not None and index > 0:
            logprob = as_number(float(score.logprob[index - 1]))
            best = ((int(score.best_token[index - 1]), as_number(float(score.best_logprob[index - 1]))),)
        tokens.append(Token(token, offset, logprob, best))
        offset += len(stream.push(token)) if index >= num_added else 0
    return Piece(text, tokens)
