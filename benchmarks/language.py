"""Accuracy of the language check: statements by language, and long texts with a passage in another language.

    python benchmarks/language.py --data FOLDER

FOLDER holds `polymath.jsonl`, lines with `lang` and `problem`. Three tables:
  statements   how many are classified right, of those that have enough letters for a verdict;
  pure         thoughts made of statements in one language, of so many characters: how many are called mixed (wrongly);
  passages     such thoughts with one statement in another language in their middle: how many are called mixed, by the
               letters of the passage (an ideograph counts as three).
"""

import collections
import json
import pathlib
import random

import tyro

from magistral_jax.verify.language import classify, strip_notation

_PURE_LENGTHS = (1_000, 4_000, 20_000)
_PASSAGES = ((40, 80), (80, 150), (150, 250), (250, 400), (400, 900))
_PAIRS = (
    ("en", "zh"), ("zh", "en"), ("en", "ru"), ("ru", "en"), ("en", "fr"), ("fr", "en"), ("en", "de"), ("de", "en"),
    ("es", "it"), ("fr", "es"),
)  # fmt: skip

Texts = dict[str, list[str]]


def main(data: pathlib.Path, repeats: int = 50, seed: int = 0) -> None:
    """Measure the language check.

    Args:
      data: Folder with polymath.jsonl.
      repeats: Synthetic texts for each cell of a table.
      seed: Of the synthetic texts.
    """
    texts: Texts = collections.defaultdict(list)
    with (data / "polymath.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            texts[row["lang"]].append(row["problem"])
    rng = random.Random(seed)
    accuracy = {language: _statements(language, statements) for language, statements in texts.items()}
    false_alarms = {length: _pure(texts, length, repeats, rng) for length in _PURE_LENGTHS}
    noticed = {f"{low}-{high}": _passages(texts, low, high, repeats, rng) for low, high in _PASSAGES}
    print(json.dumps({"benchmark": "language", "accuracy": accuracy, "false_alarms": false_alarms, "noticed": noticed}))


def _statements(language: str, statements: list[str]) -> float:
    found = collections.Counter(classify(statement) for statement in statements)
    num_short = found.pop(None, 0)
    share = found[language] / found.total()
    wrong = {str(label): count for label, count in found.items() if label != language}
    print(f"statements {language}: {share:.1%} of {found.total()}, {num_short} too short, wrong {wrong}")
    return share


def _pure(texts: Texts, length: int, repeats: int, rng: random.Random) -> dict[str, float]:
    shares = {}
    for language in texts:
        labels = [classify(_thoughts(texts[language], length, rng)) for _ in range(repeats)]
        shares[language] = sum(label != language for label in labels) / repeats
    print(f"pure, {length} characters: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return shares


def _passages(texts: Texts, low: int, high: int, repeats: int, rng: random.Random) -> dict[str, float]:
    shares = {}
    for base, other in _PAIRS:
        weight = 3 if other == "zh" else 1
        fitting = [text for text in texts[other] if low <= weight * len(strip_notation(text)) < high]
        mixes = [
            _thoughts(texts[base], 4_000, rng) + rng.choice(fitting) + "\n" + _thoughts(texts[base], 2_000, rng)
            for _ in range(repeats)
        ]
        shares[f"{other} in {base}"] = sum(classify(mix) == "mixed" for mix in mixes) / repeats
    print(f"passages of {low}-{high} letters: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return shares


def _thoughts(statements: list[str], length: int, rng: random.Random) -> str:
    text = ""
    while len(text) < length:
        text += rng.choice(statements) + "\n"
    return text


if __name__ == "__main__":
    tyro.cli(main)
