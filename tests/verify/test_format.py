import pathlib
import time

import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers
from hypothesis import given
from hypothesis import strategies as st

from magistral_jax.data.tokenizer import HfTokenizer, encode_completion
from magistral_jax.verify.format import (
    CodeBlock,
    FormatFault,
    Sections,
    find_boxes,
    first_code_block,
    last_boxed,
    split_completion,
)


def split(text: str) -> Sections | FormatFault:
    return split_completion(text, "<think>", "</think>")


def test_a_completion_is_cut_at_its_tags():
    assert split("<think>a\nb</think> c") == Sections("a\nb", " c")
    assert split("<think></think>") == Sections("", "")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", FormatFault.NO_OPENING_TAG),
        ("a</think>b", FormatFault.NO_OPENING_TAG),
        (" <think>a</think>b", FormatFault.NO_OPENING_TAG),
        ("\n<think>a</think>b", FormatFault.NO_OPENING_TAG),
        ("<THINK>a</THINK>b", FormatFault.NO_OPENING_TAG),
        ("<think>a", FormatFault.NO_CLOSING_TAG),
        ("<think>a< /think>b", FormatFault.NO_CLOSING_TAG),
        ("<think>a<think>b</think>c", FormatFault.REPEATED_TAG),
        ("<think>a</think>b</think>c", FormatFault.REPEATED_TAG),
        ("<think>a</think>b<think>", FormatFault.REPEATED_TAG),
        ("<think>a</think><think>b</think>c", FormatFault.REPEATED_TAG),
    ],
)
def test_each_broken_rule_is_named(text: str, fault: FormatFault):
    assert split(text) is fault


def test_the_tags_are_settings():
    assert split_completion("[T]a[/T]b", "[T]", "[/T]") == Sections("a", "b")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{5}, then \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"$\boxed 9$", "9"),
        (r"\boxed 10 is it", "10"),
        (r"It is \boxed 11.", "11"),
        (r"It is \boxed 2.5.", "2.5"),
        (r"\(\boxed 12\)", "12"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{13}}", "13"),
        (r"\boxed{14} and an open \boxed{15", "14"),
        (r"{ \boxed{16}", "16"),
        (r"} \boxed{17}", "17"),
        (r"\\ \boxed{18}", "18"),
        ("\\boxed{\n19\n}", "19"),
        (r"\boxedx{20}", None),
        (r"boxed{21}", None),
        (r"\boxed{22", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None):
    assert last_boxed(text) == content


@given(st.text(alphabet="ab \\{}$", max_size=40))
def test_a_balanced_box_gives_back_its_content(text: str):
    balanced = text.replace("\\", "").replace("{", "").replace("}", "")
    assert last_boxed(rf"x \boxed{{{{{balanced}}}}} y") == f"{{{balanced}}}"
    last_boxed(text)  # never raises


def test_scans_are_linear_in_hostile_text():
    start = time.process_time()
    for text in ("\\boxed{" * 50_000, "{" * 300_000 + "\\boxed{1}", "\\boxed " * 50_000, "\\boxed a" + "b" * 300_000):
        last_boxed(text)
    first_code_block("```\n" * 100_000)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\nprint(1)\n```", CodeBlock("python", "print(1)\n")),
        ("see\n\n```C++\nint x;\n```\nend", CodeBlock("c++", "int x;\n")),
        ("```\nno tag\n```\n```cpp\nint y;\n```", CodeBlock("cpp", "int y;\n")),
        ("```python\na\n```\n```cpp\nb\n```", CodeBlock("python", "a\n")),
        ("````python\n```\ninner\n```\n````", CodeBlock("python", "```\ninner\n```\n")),
        ("~~~python\na\n~~~", CodeBlock("python", "a\n")),
        ("``` python title=x\na\n```", CodeBlock("python", "a\n")),
        ("```python\nopen", None),
        ("```\nno tag\n```", None),
        ("inline ```python``` only", None),
    ],
)
def test_first_code_block(text: str, block: CodeBlock | None):
    assert first_code_block(text) == block


def test_tags_that_are_special_tokens_are_seen_in_the_decoded_text(tmp_path: pathlib.Path):
    spec = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    spec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<unk>", "</s>", "[THINK]", "[/THINK]"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spec.train_from_iterator(["some words, so that there is a vocabulary"], trainer)
    spec.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = HfTokenizer(tmp_path)
    ids = encode_completion("[THINK]some words[/THINK]\\boxed{1}", tokenizer, ("[THINK]", "[/THINK]"))
    assert ids[0] == tokenizer.special_tokens["[THINK]"]
    text = tokenizer.decode(ids[:-1])
    assert split_completion(text, "[THINK]", "[/THINK]") == Sections("some words", "\\boxed{1}")


def test_boxes_are_found_with_their_places():
    text = r"a \boxed{\boxed{1}} \boxed 2"
    boxes = [(text[box.start : box.end], box.content) for box in find_boxes(text)]
    assert boxes == [(r"\boxed{1}", "1"), (r"\boxed{\boxed{1}}", r"\boxed{1}"), (r"\boxed 2", "2")]
