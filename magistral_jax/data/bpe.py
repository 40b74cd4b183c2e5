"""A small tokenizer of one's own, for a policy from random weights; in: texts, out: the files of a model folder."""

import json
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

_CONTROL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def save_bpe(folder: pathlib.Path, texts: Iterable[str], *, vocab_size: int, think_tags: Sequence[str]) -> int:
    """Learn byte-pair merges from texts, and write `tokenizer.json` and `tokenizer_config.json`.

    Every text can be written with it, since single bytes are tokens, too; each digit is a token for itself, so that
    sums can be learnt.

    Args:
      folder: Of the model.
      texts: What the merges should serve.
      vocab_size: Most tokens, control tokens and 256 bytes included.
      think_tags: Control tokens beside those for padding, beginning and end.

    Returns:
      Tokens of the vocabulary.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_CONTROL.values(), *think_tags],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONTROL, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
