"""A tokenizer of one's own: it can write everything, numbers digit by digit, and its control tokens are known."""

import pathlib

from magistral_jax.data.bpe import save_bpe
from magistral_jax.data.sources import load_problems
from magistral_jax.data.tokenizer import load_tokenizer

TAGS = ("<think>", "</think>")


def test_a_tokenizer_that_was_learnt_from_texts(tmp_path: pathlib.Path):
    problems = load_problems("templated:sums", 200, 0)
    assert save_bpe(tmp_path, [p.statement for p in problems], vocab_size=600, think_tags=TAGS) == 600
    tokenizer = load_tokenizer(tmp_path, 600)
    for text in [*(p.statement for p in problems), "ﬁ 🦊\u0000 <think> 한"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12345")) == 5
    ids = tokenizer.encode("<think></think>", allow_special=True).tolist()
    assert ids == [tokenizer.special_tokens[tag] for tag in TAGS]
    assert len(tokenizer.encode("<think>")) > 1
    assert tokenizer.stop_ids == (tokenizer.special_tokens["<eos>"],)
    assert tokenizer.bos_id == tokenizer.special_tokens["<bos>"]


def test_the_shipped_one_serves_all_seven_languages():
    tokenizer = load_tokenizer(pathlib.Path(__file__).parents[2] / "configs/languages_coldstart", 2048)
    for problem in load_problems("templated:sums?terms=2,3&largest=4", 700, 1):
        assert len(tokenizer.encode(problem.statement)) < 80  # generation.max_prompt_tokens of configs/languages.toml
        assert len(tokenizer.encode(problem.statement)) < 0.4 * len(problem.statement.encode())
