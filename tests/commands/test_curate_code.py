"""Curation of programs from the command line, in real boxes."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from magistral_jax.main import main

PY = "n = int(input())\nprint(sum(map(int, input().split())))"
LOOP = "input()\ntotal = 0\nfor token in input().split():\n    total += int(token)\nprint(total)"
CPP = (
    "#include <bits/stdc++.h>\nint main() { long long n, x, s = 0; std::cin >> n;"
    " while (n--) { std::cin >> x; s += x; } std::cout << s; }"
)
MAX = "input()\nprint(max(map(int, input().split())))"
CRASH = "raise SystemExit(1)"
INPUTS = ["3\n1 2 3\n", "2\n5 9\n", "4\n1 1 1 7\n", "2\n40 2\n", "3\n8 8 9\n"]
ROWS = [
    {
        "id": "sums",
        "problem": "Add the numbers.",
        "tests": [
            {"input": text, "output": f"{sum(map(int, text.split()[1:])) + 5 * (number == 1)}\n"}
            for number, text in enumerate(INPUTS)
        ],
        "solutions": [PY, {"language": "cpp", "source": CPP}, LOOP, MAX, CRASH],
        "level": 2,
    },
    {
        "id": "calls",
        "problem": "Return the sum.",
        "test": "def check(candidate):\n    assert candidate(x=[1, 2]) == 3\n    assert candidate(x=[4]) == 5\n"
        "    assert candidate(x=[]) == 0\n\ncheck(Solution().add)",
        "solution": "class Solution:\n    def add(self, x: List[int]) -> int:\n        return sum(x)",
    },
    {"id": "unsolved", "problem": "Add.", "tests": [{"input": "1", "output": "1"}]},
    {"id": "any", "problem": "Print any of them.", "tests": [{"input": "1", "output": "1"}], "solution": PY},
    {"id": "wrong", "problem": "Add them.", "tests": [{"input": INPUTS[0], "output": "6"}], "solution": MAX},
]
SETTINGS = ["--curate.min_tests=2", "--curate.chunk=1", "--curate.new_tests=6", "--verifiers.num_workers=2"]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("code") / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def finished(raw: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("curated") / "out"
    main(["curate", "code", str(raw), f"--out={folder}", *SETTINGS])
    return folder


def test_what_the_solutions_say(finished: pathlib.Path):
    kept = {row["id"]: row for row in read(finished / "curated.jsonl")}
    assert list(kept) == ["sums/python", "sums/cpp", "calls/python"]
    sums = kept["sums/cpp"]
    assert [int(test["output"]) for test in sums["tests"][:5]] == [6, 14, 10, 42, 25]  # the second was 19
    assert (sums["tests_repaired"], sums["tests_kept"], sums["solutions_dropped"]) == (1, 4, 2)
    assert sums["tests_new"] == len(sums["tests"]) - 5 >= 3
    for test in sums["tests"]:
        _, *numbers = map(int, test["input"].split())
        assert int(test["output"]) == sum(numbers)
    assert (sums["level"], sums["language"], len(sums["solutions"])) == (2, "cpp", 3)
    # Nobody knows whether the only solution or its test is wrong.
    assert [test["code"].split(" == ")[1] for test in kept["calls/python"]["tests"]] == ["3\n", "0\n"]
    assert {row["id"]: row["reason"] for row in read(finished / "removed.jsonl")} == {
        "unsolved": "no solution",
        "any": "several answers",
        "wrong": "no right solution",
    }


def test_a_killed_run_ends_with_the_same_files(finished: pathlib.Path, raw: pathlib.Path, tmp_path: pathlib.Path):
    folder = tmp_path / "out"
    words = ["curate", "code", str(raw), f"--out={folder}", *SETTINGS]
    journal = folder / "judged.jsonl"
    with subprocess.Popen([sys.executable, "-c", "from magistral_jax.main import main; main()", *words]) as process:
        end = time.monotonic() + 300
        while not (journal.exists() and journal.stat().st_size) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "curated.jsonl").exists()
    with journal.open("ab") as file:
        file.write(b'{"id": "ca')  # a kill may come in the middle of a line
    main([*words, "--resume"])
    for name in ("judged.jsonl", "curated.jsonl", "removed.jsonl", "table.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
