"""The JSON of answers, whole and streamed, in OpenAI's shapes."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from magistral_jax.data.tokenizer import Tokenizer
from magistral_jax.serve.choice import Piece, Token
from magistral_jax.serve.orders import Order


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a route writes its answers."""

    prefix: str
    kind: str
    chunk_kind: str
    choice: Callable[[Piece, dict[str, Any] | None], dict[str, Any]]
    delta: Callable[[Piece, dict[str, Any] | None], dict[str, Any]]
    logprobs: Callable[[Sequence[Token], int, Tokenizer], dict[str, Any]]
    opening: dict[str, Any] | None  # the first event of each choice of a stream


class Answer:
    """Writes the answer to one request."""

    def __init__(self, shape: Shape, order: Order, tokenizer: Tokenizer, model_name: str) -> None:
        self._shape, self._order, self._tokenizer = shape, order, tokenizer
        self._head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer, of one piece for each choice."""
        choices = [
            self._choice(self._shape.choice, index, piece, with_prompt=True) for index, piece in enumerate(pieces)
        ]
        num_tokens = sum(len(piece.completion) for piece in pieces)
        return self._head | {"object": self._shape.kind, "choices": choices, "usage": self._usage(num_tokens)}

    def opening(self) -> list[dict[str, Any]]:
        """The events that a stream begins with."""
        if self._shape.opening is None:
            return []
        start = {"delta": self._shape.opening, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": index} | start]) for index in range(self._order.num_choices)]

    def chunk(self, index: int, piece: Piece, *, is_first: bool) -> list[dict[str, Any]]:
        """The events for a piece of a choice: none where it shows nothing."""
        order = self._order
        if not (piece.text or piece.finish or order.with_logprobs or order.with_token_ids):
            return []
        return [self._chunk([self._choice(self._shape.delta, index, piece, with_prompt=is_first)])]

    def closing(self, num_completion_tokens: int) -> list[dict[str, Any]]:
        """The events that a stream ends with."""
        return [self._chunk([]) | {"usage": self._usage(num_completion_tokens)}] if self._order.with_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._order.with_usage else {}
        return self._head | {"object": self._shape.chunk_kind, "choices": choices} | usage

    def _usage(self, num_completion_tokens: int) -> dict[str, int]:
        num_prompt_tokens = sum(map(len, self._order.prompts))
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
        }

    def _choice(self, write: Callable[..., dict[str, Any]], index: int, piece: Piece, *, with_prompt: bool) -> Any:
        order, logprobs = self._order, None
        if order.with_logprobs:
            logprobs = self._shape.logprobs(piece.tokens, order.num_top_logprobs, self._tokenizer)
        choice = {"index": index} | write(piece, logprobs) | {"finish_reason": piece.finish}
        if order.with_token_ids:  # the record that a trainer reads
            choice["token_ids"] = [token.id for token in piece.completion]
            choice["weight_versions"] = [token.version for token in piece.completion]
            if with_prompt:
                choice["prompt_token_ids"] = order.prompts[index // order.num_each].tolist()
        return choice


# ---- completions ----------------------------------------------------------------------------------------------------


def _completion(piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"text": piece.text, "logprobs": logprobs}


def _completion_logprobs(tokens: Sequence[Token], num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": [label(token.id, tokenizer) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_best_of(token, num_top, tokenizer) for token in tokens] if num_top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _best_of(token: Token, num_top: int, tokenizer: Tokenizer) -> dict[str, float | None] | None:
    """Log-probs by text of the most probable tokens, where they are known, and of the one that stands there."""
    if token.logprob is None:
        return None
    wanted = dict(token.best[:num_top])
    wanted.setdefault(token.id, token.logprob)
    best: dict[str, float | None] = {}
    for which, logprob in wanted.items():
        name = label(which, tokenizer)
        best[f"token_id:{which}" if name in best else name] = logprob  # two tokens may have one text
    return best


COMPLETION = Shape("cmpl", "text_completion", "text_completion", _completion, _completion, _completion_logprobs, None)


# ---- chat -----------------------------------------------------------------------------------------------------------


def _chat_message(piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": piece.text}, "logprobs": logprobs}


def _chat_delta(piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"delta": {"content": piece.text} if piece.text else {}, "logprobs": logprobs}


def _chat_logprobs(tokens: Sequence[Token], num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(which: int, logprob: float | None) -> dict[str, Any]:
        name = label(which, tokenizer)
        return {
            "token": name,
            "logprob": logprob,
            "bytes": None if name == f"token_id:{which}" else list(name.encode()),
        }

    best = lambda token: token.best[:num_top] or ((token.id, token.logprob),)[:num_top]
    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*place) for place in best(token)]}
            for token in tokens
        ]
    }


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    _chat_message,
    _chat_delta,
    _chat_logprobs,
    {"role": "assistant", "content": ""},
)


def label(token: int, tokenizer: Tokenizer) -> str:
    """Text of a token; `token_id:N` for one that is only part of a character."""
    text = tokenizer.decode([token])
    return f"token_id:{token}" if "\ufffd" in text or not text else text
