"""Folders of models that also see: Mistral Small 3.1 and 3.2 (`mistral3`), of which the text part is taken.

The text part is a Mistral model: its settings lie in `text_config`, its tensors beside those of the vision tower, under
names that depend on who wrote the folder. What is saved is a folder of that model alone.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from magistral_jax.records import MagistralError

MODEL_TYPE = "mistral3"

_TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",  # as the modules of transformers 4.52 and later are named
}
_PICTURES = ("vision_tower.", "multi_modal_projector.")


def text_config(path: pathlib.Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` would say of the text part alone.

    Args:
      path: Of the file, for messages.
      raw: Its content.

    Raises:
      MagistralError: The text part is no Mistral model.
    """
    text = {"model_type": "mistral", **(raw.get("text_config") or {})}
    if text["model_type"] != "mistral":
        raise MagistralError(f"{path}: the text part of {MODEL_TYPE} is {text['model_type']!r}; expected mistral")
    # Of two settings with this name transformers reads the outer one; folders as published have neither.
    return text | {key: raw[key] for key in ("tie_word_embeddings", "quantization_config") if key in raw}


def text_names(stored: Iterable[str]) -> dict[str, str]:
    """The tensors of the text part: from their names in a folder of text alone to those in this one."""
    names: dict[str, str] = {}
    for name in stored:
        prefix = next((prefix for prefix in _TEXT if name.startswith(prefix)), "")
        if not name.removeprefix("model.").startswith(_PICTURES):
            names[_TEXT.get(prefix, "") + name.removeprefix(prefix)] = name
    return names
