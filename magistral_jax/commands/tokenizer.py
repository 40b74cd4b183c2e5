"""`magistral-jax tokenizer`: a small byte-pair tokenizer at `policy.path`, for a policy from random weights."""

import pathlib
from collections.abc import Iterator

import numpy as np

from magistral_jax.commands.setup import say, think_tags
from magistral_jax.config import Config
from magistral_jax.data.bpe import save_bpe
from magistral_jax.data.sources import load_problems
from magistral_jax.data.traces import Trace, make_traces, read_traces
from magistral_jax.policy.hf_config import read_model_config
from magistral_jax.records import MagistralError


def tokenizer(config: Config) -> None:
    """Learn merges from what `sft` would train on, as many as `vocab_size` in `config.json` of the folder has room for.

    Raises:
      MagistralError: There is nothing to learn from, no `config.json`, or a tokenizer already.
    """
    folder = pathlib.Path(config.policy.path)
    if not config.policy.path:
        raise MagistralError("`policy.path` is empty; expected a folder with a config.json that has no tokenizer yet.")
    vocab_size = read_model_config(folder).vocab_size
    if (folder / "tokenizer_config.json").exists():
        raise MagistralError(f"{folder} has a tokenizer already; remove tokenizer_config.json to make another.")
    num = save_bpe(folder, _texts(config), vocab_size=vocab_size, think_tags=think_tags(config))
    say(f"a tokenizer of {num} tokens: {folder / 'tokenizer.json'}")


def _texts(config: Config) -> Iterator[str]:
    """Statements and completions of the traces that are given, or made."""
    for trace in _traces(config):
        yield trace.problem.statement
        yield trace.completion


def _traces(config: Config) -> list[Trace]:
    if config.sft.traces:
        return read_traces(config.sft.traces)
    if not config.data.train:
        raise MagistralError(
            "Neither `sft.traces` nor `data.train` is given; expected traces, or sums to make some for."
        )
    return make_traces(
        load_problems(config.data.train, config.data.num_train, config.run.seed),
        np.random.default_rng(config.run.seed),
        thorough_share=config.sft.thorough_share,
        lucky_share=config.sft.lucky_share,
        native_share=config.sft.native_share,
        think_tags=think_tags(config),
    )
