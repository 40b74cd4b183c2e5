"""Published code problems: their reference solutions pass, wrong ones fail.

    python benchmarks/code_sets.py --data FOLDER [--limit 100] [--mechanism auto]

FOLDER holds JSONL files of the sets below; those that are not there are named. Each problem is graded three times:

  right      the reference solution. Where a set has tests by input and output but no solutions, a program that knows
             the outputs by heart stands in: it shows that every published output is read, carried and compared well.
  wrong      the same with its results spoilt: a function returns nothing (C++: a zero), a program changes its last word
  exit       the solution leaves with code 0 before it is tested

All that is not as it should be is listed, to be looked at.
"""

import dataclasses
import json
import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from magistral_jax.records import Problem, Verdict
from magistral_jax.verify.code_grade import CodeGrader
from magistral_jax.verify.code_tests import select_tests
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.format import CodeBlock, first_code_block
from magistral_jax.verify.sandbox.mechanism import choose_mechanism


@dataclasses.dataclass(frozen=True)
class Args:
    """What to grade."""

    data: pathlib.Path
    """Folder with the sets."""
    limit: int = 0
    """Problems of each set, from its start; 0 is all."""
    sets: tuple[str, ...] = ()
    """Names of sets; none is all."""
    mechanism: str = "auto"
    """What confines programs."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem with three programs."""

    id: str
    tests: list[dict[str, str]]
    programs: dict[str, CodeBlock]


# --- sets ------------------------------------------------------------------------------------------------------------

# What LeetCode puts before every solution, and how its tests build and compare lists and trees.
_LEETCODE = """
import bisect, collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *; from collections import *; from functools import *; from heapq import *; from itertools import *
from math import *; from operator import *; from string import *; from typing import *
inf = float("inf")

class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next

class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right

def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head

def is_same_list(a, b):
    while a and b and a.val == b.val:
        a, b = a.next, b.next
    return a is None and b is None

def tree_node(values):
    nodes = [None if value is None else TreeNode(value) for value in values]
    children = iter(nodes[1:])
    for node in filter(None, nodes):
        node.left, node.right = next(children, None), next(children, None)
    return nodes[0] if nodes else None

def is_same_tree(a, b):
    if a is None or b is None:
        return a is b
    return a.val == b.val and is_same_tree(a.left, b.left) and is_same_tree(a.right, b.right)
"""
_LEAVE = "\nimport os\nos._exit(0)\n"


def python_function(id_: str, source: str, spoilt: str, codes: list[str]) -> Case:
    blocks = {"right": source, "wrong": source + spoilt, "exit": source + _LEAVE}
    tests = [{"code": code, "language": "python"} for code in codes]
    return Case(id_, tests, {name: CodeBlock("python", text) for name, text in blocks.items()})


def read_leetcode(row: dict[str, Any]) -> Case:
    spoilt = (
        "\nfor name in [n for n in vars(Solution) if n[0] != '_']:\n    setattr(Solution, name, lambda *a, **k: None)\n"
    )
    return python_function(row["id"], _LEETCODE + row["solution"], spoilt, [row["test"]])


def read_humaneval(row: dict[str, Any]) -> Case:
    entry = row["entry_point"]
    source = row["prompt"] + row["canonical_solution"]
    return python_function(
        row["task_id"], source, f"\n{entry} = lambda *a, **k: None\n", [f"{row['test']}\ncheck({entry})\n"]
    )


def read_mbpp(row: dict[str, Any]) -> Case:
    names = set(re.findall(r"(\w+)\(", " ".join(row["test_list"]))) & set(re.findall(r"def (\w+)", row["code"]))
    spoilt = "".join(f"\n{name} = lambda *a, **k: None" for name in sorted(names)) + "\n"
    codes = [f"{row['test_setup_code']}\n{test}" for test in row["test_list"]]
    return python_function(f"mbpp/{row['task_id']}", row["code"], spoilt, codes)


def read_mbpp_cpp(row: dict[str, Any]) -> Case:
    """The solutions are one model's, and a good part of them is wrong; some have a `main` of their own."""
    block = first_code_block(row["gpt_solution"])
    headers = "".join(line + "\n" for line in row["prompt"].splitlines() if line.startswith("#include"))
    source = f"{headers}#define main own_main\n{'' if block is None else block.source}\n#undef main\n"
    leave = "#include <cstdlib>\nstruct Leave { Leave() { std::exit(0); } } leave;\n"
    blocks = {"right": source, "wrong": row["prompt"] + "\nreturn {};\n}\n", "exit": source + leave}
    tests = [{"code": row["tests"].removeprefix("}"), "language": "cpp"}]
    return Case(row["task_id"], tests, {name: CodeBlock("cpp", text) for name, text in blocks.items()})


def read_stdin(row: dict[str, Any]) -> Case:
    """A program that knows the outputs by heart. Inputs may repeat, so it counts on the last output of each."""
    known = {test["input"]: test["output"] for test in row["tests"]}
    tests = [test for test in row["tests"] if known[test["input"]] == test["output"]]
    right = f"import sys\nknown = {known!r}\nout = known[sys.stdin.read()]\n"
    wrong = right + "words = out.split() or ['']\nwords[-1] = '9' + words[-1]\nout = ' '.join(words)\n"
    blocks = {"right": right + "print(out)\n", "wrong": wrong + "print(out)\n", "exit": "exit()\n"}
    return Case(row["id"], tests, {name: CodeBlock("python", text) for name, text in blocks.items()})


READERS: dict[str, Callable[[dict[str, Any]], Case]] = {
    "humaneval": read_humaneval,
    "mbpp": read_mbpp,
    "leetcode_test": read_leetcode,
    "leetcode_train": read_leetcode,
    "mbpp_cpp": read_mbpp_cpp,
    "code_contests_test": read_stdin,
    "codeforces_stdin": read_stdin,
    "sandboxfusion_code_contests": read_stdin,
}


def read_cases(args: Args, name: str) -> Iterator[Case]:
    lines = (args.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[: args.limit or None]:
        yield READERS[name](json.loads(line))


# --- grading ---------------------------------------------------------------------------------------------------------


def grade_set(grader: CodeGrader, cases: list[Case], name: str) -> tuple[dict[str, Counter[str]], list[str]]:
    """Verdicts of each kind of program, and the programs whose verdict is not as it should be."""
    config = CodeConfig(num_tests=0)
    verdicts: dict[str, Counter[str]] = {kind: Counter() for kind in ("right", "wrong", "exit")}
    odd: list[str] = []
    for case in track(cases, name, console=Console(stderr=True)):
        tests = select_tests(Problem(case.id, "", "", "code", {"tests": case.tests}), config, 0)
        for kind, block in case.programs.items():
            found = grader.grade(block, tests)
            verdicts[kind][found.verdict.value] += 1
            if (found.verdict is Verdict.CORRECT) != (kind == "right"):
                words = found.detail.strip().splitlines()
                odd.append(
                    f"{name} {case.id} {kind}: {found.verdict.value}, {found.path}  {words[-1] if words else ''}"
                )
    return verdicts, odd


def main(args: Args) -> None:
    """Grade and print."""
    names = args.sets or tuple(READERS)
    absent = [name for name in names if not (args.data / f"{name}.jsonl").is_file()]
    mechanism = choose_mechanism(args.mechanism)
    table = Table("set", "num", "right pass", "wrong fail", "exit fail", "seconds")
    results: dict[str, Any] = {"mechanism": mechanism.value, "absent": absent, "sets": {}}
    odd: list[str] = []
    with CodeGrader(mechanism, CodeConfig()) as grader:
        for name in names:
            if name in absent:
                continue
            start = time.perf_counter()
            cases = list(read_cases(args, name))
            verdicts, found = grade_set(grader, cases, name)
            odd += found
            seconds = time.perf_counter() - start
            passed = {kind: counts["correct"] for kind, counts in verdicts.items()}
            num = len(cases)
            shares = (f"{passed['right']}", f"{num - passed['wrong']}", f"{num - passed['exit']}")
            table.add_row(name, str(num), *shares, f"{seconds:.0f}")
            results["sets"][name] = {"problems": num, "seconds": round(seconds, 1), "verdicts": verdicts}
    console = Console(width=120, soft_wrap=True)
    for line in odd:
        console.print(line, markup=False, highlight=False)
    console.print(table)
    for name in absent:
        console.print(f"not there: {args.data / name}.jsonl")
    console.print(json.dumps(results), markup=False, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Args))
