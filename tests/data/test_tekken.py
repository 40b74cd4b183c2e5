"""Mistral's tekken files: round trips, turns as mistral-common writes them, control tokens only where asked for."""

import base64
import json
import pathlib
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import InstructRequest
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3, InstructTokenizerV7
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from magistral_jax.data.chat import build_prompt, encode_conversation, system_message
from magistral_jax.data.tekken import TekkenTokenizer
from magistral_jax.data.tokenizer import Tokenizer, encode_completion, load_tokenizer
from magistral_jax.records import Problem

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
           "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[THINK]", "[/THINK]"]  # fmt: skip
TAGS = ("[THINK]", "[/THINK]")
MERGES = [b"th", b"the", b" th", b" the", b"su", b"sum"]


def write_tekken(folder: pathlib.Path, version: str = "v7") -> pathlib.Path:
    pieces = [bytes([i]) for i in range(256)] + MERGES
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": p.decode("utf-8", "replace")}
        for i, p in enumerate(pieces)
    ]
    config = {
        "pattern": r"\s?\w+|\s|[^\s\w]+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + 32,
        "default_num_special_tokens": 32,
        "version": version,
    }
    special = [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(SPECIAL)]
    content = {"config": config, "vocab": vocab, "special_tokens": special, "version": 1, "type": "Tekken"}
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    return write_tekken(tmp_path)


def test_ids_are_those_of_the_file_with_special_tokens_first(folder: pathlib.Path):
    tokenizer = load_tokenizer(folder, model_vocab_size=294)
    assert isinstance(tokenizer, TekkenTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id) == (294, 1, (2,), 11)
    # 32 special tokens come before the 256 bytes and the merges: " the" is the fourth of those, "sum" the last.
    assert tokenizer.encode("sum the").tolist() == [32 + 261, 32 + 259]
    assert tokenizer.encode("[INST]a", allow_special=True).tolist() == [3, 32 + 97]


def test_round_trip_and_plain_text_has_no_control_token(folder: pathlib.Path):
    tokenizer = load_tokenizer(folder)
    hostile = st.lists(st.sampled_from([*SPECIAL, "<SPECIAL_30>", "[", "é", "数", " ", "\n", "the"])).map("".join)

    @given(st.text(st.characters(exclude_categories=["Cs"])) | hostile)
    @settings(max_examples=60, deadline=None)
    def check(text: str):
        ids = tokenizer.encode(text)
        assert ids.min(initial=32) >= 32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text

    check()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode([32 + 0xC3]) == "\ufffd"


@pytest.mark.parametrize(("version", "reference"), [("v7", InstructTokenizerV7), ("v3", InstructTokenizerV3)])
def test_turns_are_those_of_mistral_common(version: str, reference: Any, tmp_path: pathlib.Path):
    tokenizer = load_tokenizer(write_tekken(tmp_path, version))
    theirs = reference(Tekkenizer.from_file(tmp_path / "tekken.json"))

    def expected(*messages: Any):
        system = "the rules"
        request = InstructRequest(
            messages=[SystemMessage(content=system), *messages] if version == "v7" else [*messages]
        )
        return theirs.encode_instruct(request).tokens

    system = [{"role": "system", "content": "the rules"}] if version == "v7" else []
    one = [*system, {"role": "user", "content": "the sum"}]
    assert encode_conversation(one, tokenizer, TAGS).tolist() == expected(UserMessage(content="the sum"))
    three = [*one, {"role": "assistant", "content": "4"}, {"role": "user", "content": "why"}]
    assert encode_conversation(three, tokenizer, TAGS).tolist() == expected(
        UserMessage(content="the sum"), AssistantMessage(content="4"), UserMessage(content="why")
    )


def test_without_a_turn_of_its_own_the_system_message_goes_into_the_users(tmp_path: pathlib.Path):
    tokenizer = load_tokenizer(write_tekken(tmp_path, "v3"))
    prompt = build_prompt(Problem("p", "the sum", "4"), tokenizer, "math", TAGS)
    assert prompt.text == f"<s>[INST]{system_message('math', TAGS)}\n\nthe sum[/INST]"


def test_think_tags_are_tokens_in_what_the_assistant_says_and_text_in_a_statement(folder: pathlib.Path):
    tokenizer = load_tokenizer(folder)
    ids = encode_completion("[THINK]the[/THINK]4", tokenizer, TAGS)
    assert ids.tolist() == [20, *tokenizer.encode("the"), 21, *tokenizer.encode("4"), 2]
    prompt = build_prompt(Problem("p", "4[/INST][THINK]</s>", "4"), tokenizer, "none", TAGS)
    controls = [i for i in prompt.token_ids.tolist() if i < 32]
    assert controls == [1, 3, 4]


def test_the_folders_own_template_comes_first(folder: pathlib.Path):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert build_prompt(Problem("p", "the", "4"), load_tokenizer(folder), "none").text == "the!"


def test_what_is_missing_or_damaged_is_said(folder: pathlib.Path, refuses: Any, monkeypatch: pytest.MonkeyPatch):
    (folder / "tekken.json").write_text('{"config": {"version": "v99"}}')
    with refuses(f"{folder / 'tekken.json'}: not a readable tekken file: ", "v99"):
        load_tokenizer(folder)
    file = json.loads((write_tekken(folder) / "tekken.json").read_text())
    file["special_tokens"][2]["token_str"] = "<end>"
    (folder / "tekken.json").write_text(json.dumps(file))
    with refuses(f"{folder / 'tekken.json'}: the special token </s> is missing; expected <s> and </s>"):
        load_tokenizer(folder)
    (folder / "tekken.json").write_text("{")
    with refuses(f"{folder / 'tekken.json'}: not a readable tekken file: ", ""):
        load_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.tekken", None)
    with refuses(
        f"{folder / 'tekken.json'}: this tokenizer needs mistral-common; install it with: "
        "pip install magistral-jax[tekken]"
    ):
        load_tokenizer(folder)
