"""Mistral's own tokenizer: a folder with `tekken.json`, read by mistral-common (`pip install magistral-jax[tekken]`).

Used where a folder has no `tokenizer.json`. Every special token of the file is a control token: turns ([INST],
[/INST]), the system prompt, and the think tags of Magistral models ([THINK], [/THINK]), which are single tokens there;
set `reward.think_open` and `reward.think_close` to them. A chat template in `chat_template.jinja` or
`tokenizer_config.json` is used if there is one; else turns are written as mistral-common writes them.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from magistral_jax.data.tokenizer import split_at
from magistral_jax.records import MagistralError

TEKKEN_FILE = "tekken.json"
_BEGIN, _END = "<s>", "</s>"

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST]{{ message['content'] }}[/INST]"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% elif SYSTEM %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]"
    "{% else %}{{ raise_exception('this format has no place for a message of the system') }}{% endif %}{% endfor %}"
)
# From v7 on a system message stands in a turn of its own; before, it belongs into the user's (see `data.chat`).
_TEMPLATES = {
    True: _TEMPLATE.replace("SYSTEM %}", "message['role'] == 'system' %}", 1),
    False: _TEMPLATE.replace("SYSTEM %}", "false %}", 1),
}


class TekkenTokenizer:
    """See `data.tokenizer.Tokenizer`."""

    def __init__(self, folder: str | pathlib.Path, chat_template: str | None = None) -> None:
        """Read `tekken.json`; without a template of the folder's own, turns are those of the file's version.

        Raises:
          MagistralError: mistral-common is missing, or the file is damaged or lacks tokens to begin and end a turn.
        """
        path = pathlib.Path(folder) / TEKKEN_FILE
        try:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, TokenizerVersion
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer
        except ImportError:
            raise MagistralError(
                f"{path}: this tokenizer needs mistral-common; install it with: pip install magistral-jax[tekken]"
            ) from None
        try:
            self._tekken = Tekkenizer.from_file(path)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise MagistralError(f"{path}: not a readable tekken file: {error!r}") from None
        self._keep: Any = SpecialTokenPolicy.KEEP
        self.vocab_size: int = self._tekken.n_words
        names = [self._decode([i]) for i in range(self._tekken.num_special_tokens)]
        self.special_tokens: Mapping[str, int] = {name: i for i, name in enumerate(names)}
        if missing := [name for name in (_BEGIN, _END) if name not in self.special_tokens]:
            raise MagistralError(f"{path}: the special token {missing[0]} is missing; expected {_BEGIN} and {_END}")
        self.bos_id: int | None = self.special_tokens[_BEGIN]
        self.stop_ids: tuple[int, ...] = (self.special_tokens[_END],)
        self.pad_id: int = self.special_tokens.get("<pad>", self.stop_ids[0])
        self.named_tokens: Mapping[str, str] = {"bos_token": _BEGIN, "eos_token": _END}
        self.chat_template: str | None = chat_template or _TEMPLATES[self._tekken.version >= TokenizerVersion.v7]

    def encode(self, text: str, *, allow_special: bool = False) -> Int32[np.ndarray, " T"]:
        """See `Tokenizer.encode`."""
        text = text.encode("utf-8", errors="replace").decode()  # a lone surrogate is no text
        ids: list[int] = []
        for piece in split_at(text, self.special_tokens) if allow_special else [text]:
            special = self.special_tokens.get(piece) if allow_special else None
            ids.extend(self._tekken.encode(piece, bos=False, eos=False) if special is None else [special])
        return np.asarray(ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " T"] | Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._decode([int(i) for i in ids])

    def _decode(self, ids: list[int]) -> str:
        return self._tekken.decode(ids, special_token_policy=self._keep)
