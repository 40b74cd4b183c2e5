"""New inputs like those that a problem has; in: its inputs or calls, out: others of the same shape.

Nothing knows whether they keep what the statement promises: whoever uses them has to see that all solutions agree.
Numbers that count something (the lines or the tokens that follow) are left alone, and so are lengths.
"""

import ast
import random
import re
from collections.abc import Callable, Sequence

_INTEGER = re.compile(r"-?\d{1,18}")


def new_inputs(inputs: Sequence[str], num: int, seed: str) -> list[str]:
    """Up to `num` texts that are none of `inputs`; a function of its arguments."""
    return _distinct(inputs, num, seed, _changed_text)


def new_calls(calls: Sequence[str], num: int, seed: str) -> list[str]:
    """Up to `num` calls of the same function with other arguments; a function of its arguments."""
    return _distinct(calls, num, seed, _changed_call)


_Change = Callable[[Sequence[str], random.Random], str]
_TRIES = 4  # for each input that is wanted


def _distinct(originals: Sequence[str], num: int, seed: str, change: _Change) -> list[str]:
    rng = random.Random(seed)
    seen, made = set(originals), list[str]()
    for _ in range(_TRIES * num):
        if len(made) == num:
            break
        text = change(originals, rng)
        if text not in seen:
            seen.add(text)
            made.append(text)
    return made


# ---- texts ----------------------------------------------------------------------------------------------------------


def _changed_text(inputs: Sequence[str], rng: random.Random) -> str:
    """An input with some of its tokens changed: one, a line in another order, or all of them."""
    text = rng.choice(inputs)
    lines = [line.split(" ") for line in text.split("\n")]
    free = [(row, column) for row, column in _tokens(lines) if not _counts(lines, row, column)]
    if not free:
        return text
    how = rng.random()
    if how < 0.25:
        row = rng.choice(free)[0]
        columns = [column for r, column in free if r == row]
        tokens = [lines[row][column] for column in columns]
        rng.shuffle(tokens)
        for column, token in zip(columns, tokens, strict=True):
            lines[row][column] = token
    else:
        chosen = free if how < 0.6 else rng.sample(free, min(len(free), 1 + int(rng.random() * 3)))
        for row, column in chosen:
            lines[row][column] = _other_token(lines[row][column], _siblings(lines, row, column), rng)
    return "\n".join(" ".join(line) for line in lines)


def _tokens(lines: list[list[str]]) -> list[tuple[int, int]]:
    return [(row, column) for row, line in enumerate(lines) for column, token in enumerate(line) if token.strip()]


def _counts(lines: list[list[str]], row: int, column: int) -> bool:
    """Whether a number tells how many lines or tokens follow, or how long a word is."""
    if not _INTEGER.fullmatch(lines[row][column]):
        return False
    value = int(lines[row][column])
    rest = [line for line in lines[row + 1 :] if any(token.strip() for token in line)]
    sizes = {sum(bool(token.strip()) for token in line) for line in rest}
    lengths = {len(token.strip()) for line in rest for token in line if not _INTEGER.fullmatch(token.strip())}
    return value > 0 and (
        value in sizes - {1} or value in lengths or 0 <= len(rest) - value <= 1 or _divides(value, rest)
    )


def _divides(value: int, rest: list[list[str]]) -> bool:
    """Whether so many cases of equally many lines follow a first line."""
    return value > 1 and len(rest) >= value and len(rest) % value == 0


_LONG_LINE = 5  # tokens: fewer are fields of a record where there are several such lines, more are a list


def _siblings(lines: list[list[str]], row: int, column: int) -> list[str]:
    """Tokens of the same line, or of the same column of lines that are alike."""
    line = lines[row]
    alike = [other[column] for other in lines if len(other) == len(line)]
    return alike if len(alike) > 1 and len(line) < _LONG_LINE else line


def _other_token(token: str, siblings: Sequence[str], rng: random.Random) -> str:
    if not _INTEGER.fullmatch(token):
        return _other_word(token, rng)
    values = [int(other) for other in siblings if _INTEGER.fullmatch(other)]
    value, low, high = int(token), min(values), max(values)
    if low == high:
        low, high = (value // 2, 2 * value + 1) if value >= 0 else (2 * value, -1)
    return str(rng.choice([rng.randint(low, high), rng.choice(values), min(value + 1, high)]))


def _other_word(word: str, rng: random.Random) -> str:
    """A word of the same length from the same letters; digits stay digits, and punctuation stays."""
    letters = sorted({letter for letter in word if letter.isalnum()})
    return "".join(rng.choice(letters) if letter.isalnum() else letter for letter in word)


# ---- calls ----------------------------------------------------------------------------------------------------------


def _changed_call(calls: Sequence[str], rng: random.Random) -> str:
    """A call with some of its literal arguments changed."""
    text = rng.choice(calls)
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call):
        return text
    call.args = [_changed_argument(argument, rng) for argument in call.args]
    for keyword in call.keywords:
        keyword.value = _changed_argument(keyword.value, rng)
    return ast.unparse(call)


def _changed_argument(node: ast.expr, rng: random.Random) -> ast.expr:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return node
    return ast.parse(repr(_other_value(value, rng)), mode="eval").body


def _other_value(value: object, rng: random.Random) -> object:  # noqa: PLR0911 one return for each type
    """A value of the same type; a list may also be put in another order, lose its last item or repeat one."""
    match value:
        case bool():
            return rng.random() < 0.5
        case int():
            return rng.choice([value, rng.randint(min(value, 0), max(2 * abs(value), 5)), value + 1])
        case float():
            return round(value * rng.uniform(0.5, 2.0), 5)
        case str():
            return _other_word(value, rng) if rng.random() < 0.7 else value
        case list():
            items = [_other_value(item, rng) if rng.random() < 0.5 else item for item in value]
            how = rng.random()
            if how < 0.2:
                rng.shuffle(items)
            elif how < 0.35 and len(items) > 1:
                items.pop()
            elif how < 0.5 and items:
                items.append(rng.choice(items))
            return items
        case tuple():
            return tuple(_other_value(item, rng) for item in value)
    return value
