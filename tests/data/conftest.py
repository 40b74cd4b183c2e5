"""A small byte-level BPE tokenizer folder, as a chat model has it, and one sentence per error."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers

from magistral_jax.records import MagistralError

CORPUS = ["the sum of the terms is the result of the sum", "user assistant system think about the answer"] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_chat_folder(folder: pathlib.Path, template: Any):
    """tokenizer.json with `<think>` as an added token that is *not* marked special, as in Qwen3's file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [tokenizers.AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")]
    )
    tokenizer.enable_truncation(8)  # as a file may carry from its training
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "chat_template": template,
        "model_max_length": 1000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    return folder


@pytest.fixture
def make_folder(tmp_path: pathlib.Path):
    """A chat model's tokenizer folder with another template."""
    return lambda template: make_chat_folder(tmp_path / "chat", template)


@pytest.fixture
def chat_folder(make_folder: Callable[[Any], pathlib.Path]):
    return make_folder(TEMPLATE)


@pytest.fixture
def refuses():
    """`with refuses(sentence)` expects a MagistralError of just this sentence, or with all these parts in one line."""

    @contextlib.contextmanager
    def expect(*parts: str):
        with pytest.raises(MagistralError) as error:
            yield
        text = str(error.value)
        assert "\n" not in text
        if len(parts) == 1:
            assert text == parts[0]
        for part in parts:
            assert part in text

    return expect
