"""Text to token ids and back; in: a model folder, out: a `Tokenizer`.

Control tokens (`<think>`, `<eos>`, `<|im_end|>` …) are recognised only where the caller asks for them. Text that comes
from outside, a problem statement above all, is encoded as plain text, so that it cannot close a turn or open thoughts.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from magistral_jax.records import MagistralError

BYTE_TOKENIZER_CLASS = "MagistralByteTokenizer"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens and their ids."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion; the first one is what training data ends with."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Token before a text without chat template, where the model has one."""
        ...

    @property
    def pad_id(self) -> int:
        """An id to fill arrays with; masks, never this id, say what is padding."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat format."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """Texts of the tokens that chat templates know by name, such as `bos_token`."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> Int32[np.ndarray, " T"]:
        """Token ids of `text`, nothing added; control tokens are recognised only with `allow_special`."""
        ...

    def decode(self, ids: Int[np.ndarray, " T"] | Iterable[int]) -> str:
        """Text of `ids` with control tokens visible; bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, and five control tokens; the vocabulary is rounded up to a multiple of 8."""

    vocab_size = 264
    special_tokens: Mapping[str, int] = {"<pad>": 256, "<bos>": 257, "<eos>": 258, "<think>": 259, "</think>": 260}
    stop_ids = (258,)
    bos_id = 257
    pad_id = 256
    chat_template = None
    named_tokens: Mapping[str, str] = {}

    def encode(self, text: str, *, allow_special: bool = False) -> Int32[np.ndarray, " T"]:
        """See `Tokenizer.encode`."""
        ids: list[int] = []
        for piece in split_at(text, self.special_tokens) if allow_special else [text]:
            special = self.special_tokens.get(piece) if allow_special else None
            ids.extend(piece.encode("utf-8", errors="replace") if special is None else [special])
        return np.asarray(ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " T"] | Iterable[int]) -> str:
        """See `Tokenizer.decode`; ids that stand for nothing become U+FFFD."""
        names = {id_: name.encode() for name, id_ in self.special_tokens.items()}
        data = b"".join(bytes([i]) if 0 <= i < 256 else names.get(i, "\ufffd".encode()) for i in map(int, ids))
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the file by which `load_tokenizer` knows a folder of this tokenizer."""
        text = json.dumps({"tokenizer_class": BYTE_TOKENIZER_CLASS}, indent=2)
        (pathlib.Path(folder) / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class HfTokenizer:
    """A Hugging Face `tokenizer.json` with what the JSON files beside it say about stop tokens and chat format.

    Two instances of the same tokenizer are kept, one for text with control tokens and one for plain text. Every added
    token counts as a control token unless it is white space: `<think>` and `<tool_call>` of Qwen3, for one, are not
    marked as special in its file.
    """

    def __init__(self, folder: str | pathlib.Path) -> None:
        folder = pathlib.Path(folder)
        spec = _read_json(folder / "tokenizer.json")
        for token in spec.get("added_tokens") or []:
            token["special"] = bool(token["content"].strip())
        source = json.dumps(spec)
        try:
            self._with_special = tokenizers.Tokenizer.from_str(source)
            self._plain = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises nothing narrower
            raise MagistralError(f"{folder / 'tokenizer.json'}: not a readable tokenizer: {error}") from None
        self._plain.encode_special_tokens = True
        for tokenizer in (self._with_special, self._plain):
            tokenizer.no_truncation()  # files saved after training may carry both
            tokenizer.no_padding()
        added = self._with_special.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {t.content: id_ for id_, t in added.items() if t.special}
        self.vocab_size = 1 + max(self._with_special.get_vocab(with_added_tokens=True).values())

        config = _read_json(folder / "tokenizer_config.json", missing={})
        self.named_tokens: Mapping[str, str] = {
            name: _content(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None
        }
        self.chat_template = _chat_template(folder, config)
        self.bos_id = self._with_special.token_to_id(self.named_tokens.get("bos_token", ""))
        self.stop_ids = self._find_stop_ids(folder)
        pad_id = self._with_special.token_to_id(self.named_tokens.get("pad_token", ""))
        self.pad_id = self.stop_ids[0] if pad_id is None else pad_id

    def encode(self, text: str, *, allow_special: bool = False) -> Int32[np.ndarray, " T"]:
        """See `Tokenizer.encode`."""
        text = text.encode("utf-8", errors="replace").decode()  # a lone surrogate is no text
        tokenizer = self._with_special if allow_special else self._plain
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        if not allow_special and not set(self.special_tokens.values()).isdisjoint(ids.tolist()):
            raise MagistralError(f"this tokenizer cannot write {text[:80]!r} without a control token")
        return ids

    def decode(self, ids: Int[np.ndarray, " T"] | Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._with_special.decode([int(i) for i in ids], skip_special_tokens=False)

    def _find_stop_ids(self, folder: pathlib.Path) -> tuple[int, ...]:
        """The tokenizer's end token first, then those of generation_config.json and config.json."""
        found: list[int | None] = [self._with_special.token_to_id(self.named_tokens.get("eos_token", ""))]
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(folder / name, missing={}).get("eos_token_id")
            found.extend(ids if isinstance(ids, list) else [ids])
        stop_ids = tuple(dict.fromkeys(i for i in found if i is not None))
        if not stop_ids:
            raise MagistralError(
                f"{folder}: no stop token found; expected eos_token in tokenizer_config.json, "
                "or eos_token_id in generation_config.json or config.json"
            )
        return stop_ids


_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(folder: str | pathlib.Path, model_vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder; what is in the folder decides which kind.

    Args:
      folder: Holds `tokenizer.json`, or Mistral's `tekken.json`, or a `tokenizer_config.json` that names the byte
        tokenizer.
      model_vocab_size: Rows of the model's embedding table; checked where given.

    Raises:
      MagistralError: No tokenizer there, or one with more tokens than the model has embeddings.
    """
    folder = pathlib.Path(folder)
    config = _read_json(folder / "tokenizer_config.json", missing={})
    if config.get("tokenizer_class") == BYTE_TOKENIZER_CLASS:
        tokenizer: Tokenizer = ByteTokenizer()
    elif (folder / "tokenizer.json").exists():
        tokenizer = HfTokenizer(folder)
    elif (folder / "tekken.json").exists():
        from magistral_jax.data.tekken import TekkenTokenizer  # an optional package

        tokenizer = TekkenTokenizer(folder, _chat_template(folder, config))
    else:
        raise MagistralError(
            f"{folder}: no tokenizer there; expected tokenizer.json (a folder with only tokenizer.model gets one from "
            "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
        raise MagistralError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
            f"the model's vocab_size is {model_vocab_size}; they do not belong together"
        )
    return tokenizer


def encode_completion(text: str, tokenizer: Tokenizer, think_tags: tuple[str, str]) -> Int32[np.ndarray, " T"]:
    """Ids of a completion to imitate: the think tags as tokens where the tokenizer has them, and the stop token."""
    return np.concatenate([encode_pieces(text, tokenizer, think_tags), np.asarray(tokenizer.stop_ids[:1], np.int32)])


def encode_pieces(text: str, tokenizer: Tokenizer, tags: Iterable[str]) -> Int32[np.ndarray, " T"]:
    """Ids of plain text in which `tags` are tokens, those that the tokenizer has."""
    known = [tag for tag in tags if tag in tokenizer.special_tokens]
    pieces = [tokenizer.encode(piece, allow_special=piece in known) for piece in split_at(text, known)]
    return np.concatenate([np.zeros(0, np.int32), *pieces])


def split_at(text: str, marks: Iterable[str]) -> list[str]:
    """`text` cut around every occurrence of a mark; the marks stay as pieces of their own."""
    marks = sorted(marks, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    return [piece for piece in pieces if piece]


def _chat_template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    """The template in chat_template.jinja, else the one in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _content(token: str | Mapping[str, Any]) -> str:
    """A named token is written as its text or as a record of an added token."""
    return token if isinstance(token, str) else token["content"]


def _read_json(path: pathlib.Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file; `missing` stands in for a file that is not there."""
    if missing is not None and not path.exists():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MagistralError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise MagistralError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
