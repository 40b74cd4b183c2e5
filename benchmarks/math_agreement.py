"""Agreement of the math grader with what others have labelled.

    python benchmarks/math_agreement.py                  # math-verify's own test suite, fetched from PyPI
    python benchmarks/math_agreement.py --data FOLDER    # reference answers of problem files, against themselves

The suite's pairs are read out of the source archive of math-verify 0.9.0 at run time; nothing of it is kept. A pair is
a gold answer, a prediction, and whether they count as equal. Both are often whole solutions, so both go through our own
extraction. Where the suite asks for LaTeX alone, texts without a formula have no answer; where it names a number of
decimals, so do we. docs/math_agreement.md argues every disagreement.

With --data, the answers in each `*.jsonl` file that has some are graded against themselves as a completion would be:
boxed, in a sentence; those that no grammar reads, and that are not words either, are counted. With --pairs N, N random
pairs of different answers of a file are graded as well, and those that count as equal are listed for the eye: a false
positive would be among them.
"""

import ast
import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator

import tyro

from magistral_jax.records import Verdict
from magistral_jax.verify.extract import extract_answer
from magistral_jax.verify.formulas import find_formulas
from magistral_jax.verify.math_answer import grade_math, is_parsable
from magistral_jax.verify.math_text import normalise, words

_ARCHIVE = "math_verify-0.9.0.tar.gz"
_SHA256 = "45ac6c61344ba056b9e99a660a4bc8d044ed408f730aed68c60435aa5eec4645"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of a parametrised test."""

    name: str  # file::function[row]
    gold: str
    prediction: str
    is_equal: bool
    needs_formula: bool
    decimals: int | None


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """A pair that we judge otherwise, and what was compared."""

    pair: Pair
    gold: str | None
    prediction: str | None
    path: str


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The source archive from PyPI. Raises where it cannot be had, or is not the one that we know."""
    words = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder), "math-verify==0.9.0"]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    archive = folder / _ARCHIVE
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{_ARCHIVE} has the SHA-256 {digest}, not {_SHA256}")
    return archive


def read_pairs(archive: pathlib.Path) -> Iterator[Pair]:
    """Every gold-prediction pair in the parametrised tests of the archive."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            path = pathlib.PurePath(member.name)
            if path.parent.name == "tests" and path.name.startswith("test_"):
                source = tar.extractfile(member)
                assert source is not None
                yield from _pairs_of(path.stem, ast.parse(source.read()))


def _pairs_of(file: str, module: ast.Module) -> Iterator[Pair]:
    for function in (node for node in module.body if isinstance(node, ast.FunctionDef)):
        body = ast.unparse(function)
        for call in (node for node in function.decorator_list if isinstance(node, ast.Call)):
            names = [name.strip() for name in str(ast.literal_eval(call.args[0])).split(",")]
            if "gold" not in names:
                continue
            assert isinstance(call.args[1], ast.List)
            for row, node in enumerate(call.args[1].elts):
                values = dict(zip(names, _literal(node), strict=True))
                decimals = values.get("precision")
                yield Pair(
                    name=f"{file}::{function.name}[{row}]",
                    gold=values["gold"],
                    prediction=values["pred"],
                    is_equal=bool(values.get("expected", values.get("result"))),
                    needs_formula="match_types=['latex'])" in body,
                    decimals=decimals if decimals is not None else 5 if "precision=5" in body else None,
                )


def _literal(node: ast.expr) -> tuple:
    """A literal; one row is written with f-strings and math.sqrt. The archive's hash has been checked."""
    code = compile(ast.Expression(node), "pair", "eval")
    return eval(code, {"__builtins__": {}, "math": math})


def judge(pair: Pair) -> Disagreement | None:
    """None where we agree."""
    gold, prediction = (_answer(text, pair.needs_formula) for text in (pair.gold, pair.prediction))
    verdict, path = grade_math(prediction or "", gold or "", decimals=pair.decimals)
    if (verdict is Verdict.CORRECT) == pair.is_equal:
        return None
    return Disagreement(pair, gold, prediction, path)


def _answer(text: str, needs_formula: bool) -> str | None:
    if needs_formula and "boxed" not in text and next(find_formulas(text), None) is None:
        return None
    return extract_answer(text)


# ---- reference answers of a folder ----------------------------------------------------------------------------------


def check_folder(folder: pathlib.Path, num_pairs: int) -> None:
    totals = collections.Counter[str]()
    for file in sorted(folder.glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        answers = [str(row["answer"]) for row in rows if row.get("answer") not in (None, "")]
        if not answers:
            continue
        start = time.process_time()
        failed = [answer for answer in answers if not _equals_itself(answer)]
        rate = len(answers) / (time.process_time() - start)
        unread = sum(not (is_parsable(answer) or words(normalise(answer))) for answer in answers)
        print(f"{file.stem:24} {len(answers):6} answers, {len(failed)} fail, {unread} unread, {rate:,.0f} a second")
        for answer in failed:
            print(f"    {answer!r}")
        for left, right in _equal_pairs(answers, num_pairs):
            print(f"    equal: {left!r} and {right!r}")
        totals["answers"] += len(answers)
        totals["failed"] += len(failed)
        totals["unread"] += unread
    print(json.dumps({"benchmark": "math_agreement", "share": 1 - totals["failed"] / totals["answers"], **totals}))


def _equals_itself(answer: str) -> bool:
    completion = f"So the final answer is \\boxed{{{answer}}}."
    return grade_math(extract_answer(completion) or "", answer)[0] is Verdict.CORRECT


def _equal_pairs(answers: list[str], num_pairs: int) -> Iterator[tuple[str, str]]:
    different = list(dict.fromkeys(answers))
    rng = random.Random(0)
    for _ in range(num_pairs if len(different) > 1 else 0):
        left, right = rng.sample(different, 2)
        if grade_math(left, right)[0] is Verdict.CORRECT:
            yield left, right


def main(data: pathlib.Path | None = None, pairs: int = 0) -> None:
    """Agreement with math-verify's suite, or of the answers in a folder with themselves.

    Args:
      data: Folder of JSON Lines files with a column `answer`.
      pairs: Random pairs of different answers to grade, for each file.
    """
    if data is not None:
        check_folder(data, pairs)
        return
    with tempfile.TemporaryDirectory() as folder:
        suite = list(read_pairs(fetch(pathlib.Path(folder))))
    start = time.process_time()
    found = [disagreement for pair in suite if (disagreement := judge(pair))]
    seconds = time.process_time() - start
    for item in found:
        print(f"{item.pair.name}: {item.prediction!r} for {item.gold!r}, ", end="")
        print(f"equal to math-verify: {item.pair.is_equal}; decided here by {item.path}")
    share = 1 - len(found) / len(suite)
    print(f"{len(suite) - len(found)} of {len(suite)} pairs agree: {share:.1%}, {len(suite) / seconds:,.0f} a second")
    print(json.dumps({"benchmark": "math_agreement", "pairs": len(suite), "disagree": len(found), "share": share}))


if __name__ == "__main__":
    tyro.cli(main)
