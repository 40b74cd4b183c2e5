"""Tokenizers: round trips, control tokens only where asked for, stop tokens, and folders that do not fit."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.data.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer, encode_completion, load_tokenizer

TAGS = ("<think>", "</think>")
BYTES = ByteTokenizer()
# Text with control tokens in unlikely places, which plain text strategies almost never draw.
HOSTILE = st.lists(
    st.sampled_from([*BYTES.special_tokens, "<s>", "<|im_end|>", "<", ">", "think", "é", "数", " ", "\n"])
).map("".join)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_the_byte_vocabulary():
    assert BYTES.encode("Aé\n").tolist() == [65, 0xC3, 0xA9, 10]
    assert BYTES.encode("<bos>a<think>b</think><eos><pad>", allow_special=True).tolist() == [
        257, 97, 259, 98, 260, 258, 256,
    ]  # fmt: skip
    assert BYTES.encode("").shape == (0,)
    assert BYTES.encode("x").dtype == np.int32
    assert isinstance(BYTES, Tokenizer)


@given(st.text(st.characters(exclude_categories=["Cs"])) | HOSTILE)
@settings(max_examples=100, deadline=None)
def test_bytes_round_trip_and_plain_text_has_no_control_token(text: str):
    plain = BYTES.encode(text)
    assert plain.max(initial=0) < 256
    assert BYTES.decode(plain) == text
    assert BYTES.decode(BYTES.encode(text, allow_special=True)) == text


def test_half_a_character_is_decoded_as_a_replacement():
    assert BYTES.decode([97, 0xC3]) == "a\ufffd"
    assert BYTES.decode(np.array([0xC3, 0xA9])) == "é"


def test_control_tokens_and_unused_ids_stay_visible():
    assert BYTES.decode([259, 97, 260, 258, 263]) == "<think>a</think><eos>\ufffd"


def test_a_lone_surrogate_is_replaced():
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a?b"


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_the_hf_tokenizer_equals_that_of_transformers(chat_folder: pathlib.Path):
    ours, theirs = load_tokenizer(chat_folder), transformers.AutoTokenizer.from_pretrained(chat_folder)
    text = "the sum of <think> the terms, é 数 <|im_end|> and much more than eight tokens of it\n\n"
    ids = ours.encode(text, allow_special=True)
    assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text


def test_hf_round_trip_without_control_tokens(chat_folder: pathlib.Path):
    tokenizer = HfTokenizer(chat_folder)
    control = set(tokenizer.special_tokens.values())
    assert set(tokenizer.special_tokens) == {"<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"}

    @given(st.text(st.characters(exclude_categories=["Cs"])) | HOSTILE)
    @settings(max_examples=100, deadline=None)
    def check(text: str):
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids.tolist())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text

    check()


def test_stop_tokens_come_from_all_three_files_the_tokenizer_first(chat_folder: pathlib.Path):
    assert load_tokenizer(chat_folder).stop_ids == (3, 1)
    (chat_folder / "generation_config.json").unlink()
    assert load_tokenizer(chat_folder).stop_ids == (3,)
    (chat_folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load_tokenizer(chat_folder).stop_ids == (3, 1)


def test_named_ids(chat_folder: pathlib.Path):
    tokenizer = load_tokenizer(chat_folder)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 3)  # without a pad token, the stop token fills arrays
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert tokenizer.vocab_size == max(tokenizer.special_tokens.values()) + 1


def test_a_template_file_comes_before_the_one_in_the_configuration(chat_folder: pathlib.Path):
    (chat_folder / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(chat_folder).chat_template == "from the file"


def test_the_default_of_several_templates_is_taken(make_folder: Callable[[Any], pathlib.Path]):
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_tokenizer(make_folder(several)).chat_template == "d"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_byte_folder_is_known_by_its_configuration(tmp_path: pathlib.Path):
    BYTES.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path, 264), ByteTokenizer)


def test_an_empty_folder_is_named(tmp_path: pathlib.Path, refuses: Any):
    with refuses(
        f"{tmp_path}: no tokenizer there; expected tokenizer.json (a folder with only tokenizer.model gets one from "
        "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(chat_folder: pathlib.Path, tmp_path: pathlib.Path, refuses: Any):
    size = load_tokenizer(chat_folder).vocab_size
    load_tokenizer(chat_folder, size)
    with refuses(
        f"{chat_folder}: the tokenizer has ids up to {size - 1}, the model's vocab_size is {size - 1}; "
        "they do not belong together"
    ):
        load_tokenizer(chat_folder, size - 1)
    BYTES.save(tmp_path)
    with refuses(
        f"{tmp_path}: the tokenizer has ids up to 263, the model's vocab_size is 256; they do not belong together"
    ):
        load_tokenizer(tmp_path, 256)


def test_a_folder_without_stop_token_is_refused(chat_folder: pathlib.Path, refuses: Any):
    (chat_folder / "generation_config.json").unlink()
    (chat_folder / "tokenizer_config.json").unlink()
    with refuses(
        f"{chat_folder}: no stop token found; expected eos_token in tokenizer_config.json, "
        "or eos_token_id in generation_config.json or config.json"
    ):
        load_tokenizer(chat_folder)


def test_broken_files_are_named(chat_folder: pathlib.Path, refuses: Any):
    (chat_folder / "tokenizer.json").write_text('{"model": {"type": "unheard of"}}')
    with refuses(f"{chat_folder / 'tokenizer.json'}: not a readable tokenizer: ", ""):
        load_tokenizer(chat_folder)
    (chat_folder / "tokenizer.json").write_text("{")
    with refuses(f"{chat_folder / 'tokenizer.json'}: expected a JSON object: ", ""):
        load_tokenizer(chat_folder)
    (chat_folder / "tokenizer_config.json").write_text("[1]")
    with refuses(f"{chat_folder / 'tokenizer_config.json'}: expected a JSON object, found list"):
        load_tokenizer(chat_folder)


# --- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_has_tags_as_tokens_and_ends_with_the_stop_token():
    ids = encode_completion("<think>a</think>\\boxed{1}", BYTES, TAGS)
    assert ids.tolist() == [259, 97, 260, *b"\\boxed{1}", 258]


def test_other_control_tokens_in_a_completion_are_text():
    ids = encode_completion("<think><eos></think>", BYTES, TAGS)
    assert ids.tolist() == [259, *b"<eos>", 260, 258]


def test_tags_that_are_no_tokens_are_text(chat_folder: pathlib.Path):
    tokenizer = load_tokenizer(chat_folder)
    ids = encode_completion("[THINK]the[/THINK]", tokenizer, ("[THINK]", "[/THINK]"))
    assert ids.tolist() == [*tokenizer.encode("[THINK]the[/THINK]").tolist(), 3]
    assert encode_completion("<think>the</think>", tokenizer, TAGS).tolist() == [
        tokenizer.special_tokens["<think>"],
        *tokenizer.encode("the").tolist(),
        tokenizer.special_tokens["</think>"],
        3,
    ]
