"""Text of a completion while it is sampled: whole characters only, and nothing that may be part of a stop text."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

_UNFINISHED = "\ufffd"  # what bytes that are not, or not yet, a character are decoded to
_LONGEST_CHARACTER = 4  # tokens: a UTF-8 character has at most as many bytes, a token has at least one


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`."""
        ...


class TextStream:
    """Decodes token by token; the pieces together are the text of all tokens.

    A token is decoded behind those of the piece before it, because some decoders treat the first one differently.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._decode = tokenizer.decode
        self._before: list[int] = []
        self._before_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes: empty in the middle of a character."""
        self._pending.append(token)
        text = self._text(self._pending)
        if not text.endswith(_UNFINISHED):
            return self._take(len(self._pending), text)
        if len(self._pending) < _LONGEST_CHARACTER:
            return ""
        # So many tokens and still no character: what comes first is broken for good, the rest may yet become one.
        count = next((k for k in range(1, len(self._pending)) if self._can_cut(k, text)), 1)
        return self._take(count, self._text(self._pending[:count]))

    def flush(self) -> str:
        """What is held back, at the end."""
        return self._take(len(self._pending), self._text(self._pending))

    def _can_cut(self, count: int, text: str) -> bool:
        return self._text(self._pending[:count]) + self._decode(self._pending[count:]) == text

    def _text(self, tokens: list[int]) -> str:
        return self._decode([*self._before, *tokens])[len(self._before_text) :]

    def _take(self, count: int, text: str) -> str:
        if count:
            self._before, self._pending = self._pending[:count], self._pending[count:]
            self._before_text = self._decode(self._before)
        return text


class StopMatcher:
    """Finds the first stop text; holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown, whether a stop text was found behind it)."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        beginnings = (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        num_shown = len(self._held) - max(beginnings, default=0)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown, False

    def flush(self) -> str:
        """What is held back, at the end."""
        shown, self._held = self._held, ""
        return shown
