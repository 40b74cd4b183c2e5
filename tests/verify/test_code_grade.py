"""Verdicts on programs, in both mechanisms: right ones are accepted whatever their style, wrong ones are not."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from magistral_jax.records import MagistralError, Problem, Verdict
from magistral_jax.verify.code_grade import CodeGrader, CodeVerdict
from magistral_jax.verify.code_run import GraderBoxes
from magistral_jax.verify.code_tests import CodeTests, select_tests
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.format import CodeBlock
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.execution import Mechanism

CONFIG = CodeConfig()


@pytest.fixture(scope="module", params=[Mechanism.BUBBLEWRAP, Mechanism.LANDLOCK], ids=lambda it: it.value)
def grader(request: pytest.FixtureRequest) -> Iterator[CodeGrader]:
    with CodeGrader(request.param, CONFIG) as grader:
        yield grader


@pytest.fixture(scope="module")
def landlock_grader() -> Iterator[CodeGrader]:
    with CodeGrader(Mechanism.LANDLOCK, CONFIG) as grader:
        yield grader


def make_tests(*pairs: tuple[str, str], **columns: Any) -> CodeTests:
    rows = [{"input": input_, "output": output} for input_, output in pairs]
    return select_tests(Problem("p", "s", "", "code", {"tests": rows, **columns}), CONFIG, 0)


def judged(grader: CodeGrader, language: str, source: str, tests: CodeTests) -> CodeVerdict:
    return grader.grade(CodeBlock(language, source), tests)


ADD = (("1 2\n", "3\n"), ("20 22\n", "42\n"))
ADDS = "print(sum(map(int, input().split())))\n"
IO = "int a, b; std::cin >> a >> b; std::cout << a + b << std::endl;"

# --- wrong programs --------------------------------------------------------------------------------------------------

FLOOD = "while True: print('x' * 1000)\n"
WRONG_PROGRAMS = [
    ("python", "print(3)\n", Verdict.WRONG, "test 2: token 1 differs"),
    ("python", "print(sum(map(int, input().split())), 0)\n", Verdict.WRONG, "test 1: 2 tokens, expected 1"),
    ("python", "", Verdict.WRONG, "test 1: 0 tokens, expected 1"),
    ("python", ADDS + "exit(1)\n", Verdict.RUNTIME_ERROR, "test 1: exit code 1"),
    ("python", ADDS + "1 / 0\n", Verdict.RUNTIME_ERROR, "test 1: exit code 1"),
    ("python", "print(3\n", Verdict.RUNTIME_ERROR, "test 1: exit code 1"),
    ("python", "import os\nos.abort()\n", Verdict.RUNTIME_ERROR, "test 1: signal 6"),
    ("python", "while True: pass\n", Verdict.TIMEOUT, "test 1: timeout"),
    ("python", "import time\ntime.sleep(1000)\n", Verdict.TIMEOUT, "test 1: timeout"),
    ("python", "x = [0] * 10**9\n", Verdict.MEMORY_LIMIT, "test 1: memory_limit"),
    ("python", FLOOD, Verdict.OUTPUT_LIMIT, "test 1: output_limit"),
    ("cpp", "int main() {}\n", Verdict.WRONG, "test 1: 0 tokens, expected 1"),
    ("cpp", f"#include <iostream>\nint main() {{ {IO} return 1; }}\n", Verdict.RUNTIME_ERROR, "test 1: exit code 1"),
    ("cpp", "int main() { int *p = nullptr; *(volatile int *)p = 1; }\n", Verdict.RUNTIME_ERROR, "test 1: signal 11"),
    ("cpp", "int main() { for (volatile int x = 0;; x++) {} }\n", Verdict.TIMEOUT, "test 1: timeout"),
    (
        "cpp",
        "#include <vector>\nint main() { std::vector<int> v(100'000'000, 1); return v[5] - 1; }\n",
        Verdict.MEMORY_LIMIT,
        "test 1: memory_limit",
    ),
    (
        "cpp",
        '#include <cstdio>\nint main() { for (;;) puts("flood"); }\n',
        Verdict.OUTPUT_LIMIT,
        "test 1: output_limit",
    ),
    ("cpp", "int main() { return x; }\n", Verdict.COMPILE_ERROR, "compile_error"),
    ("cpp", "int f() { return 1; }\n", Verdict.COMPILE_ERROR, "compile_error"),
    ("java", "class A {}\n", Verdict.UNPARSABLE, "language:java"),
]


@pytest.mark.parametrize(("language", "source", "verdict", "path"), WRONG_PROGRAMS)
def test_a_wrong_program_is_not(language: str, source: str, verdict: Verdict, path: str, grader: CodeGrader):
    quick = dataclasses.replace(make_tests(*ADD), cpu_seconds=0.5, wall_seconds=1.0)
    found = judged(grader, language, source, quick)
    assert (found.verdict, found.path, found.passed, found.total) == (verdict, path, path.startswith("test 2"), 2)


def test_a_compiler_that_takes_too_long():
    bomb = (
        "template <int n, int m> struct T { T<n - 1, m> a; T<n - 1, m + (1 << n)> b; };\n"
        "template <int m> struct T<0, m> {};\n"
    )
    config = CodeConfig(compile_seconds=1.0)
    with CodeGrader(Mechanism.LANDLOCK, config) as grader:
        found = judged(grader, "cpp", bomb + "T<25, 0> t;\nint main() {}\n", make_tests(*ADD))
        assert (found.verdict, found.path) == (Verdict.COMPILE_ERROR, "compile_timeout")
        assert judged(grader, "cpp", "int main() {}", make_tests(("", ""))).verdict is Verdict.CORRECT


def test_words_for_people(landlock_grader: CodeGrader):
    assert "'x' was not declared" in judged(landlock_grader, "cpp", "int main() { return x; }", make_tests(*ADD)).detail
    assert "ZeroDivisionError" in judged(landlock_grader, "python", "1 / 0", make_tests(*ADD)).detail


def test_one_solution_does_not_leak_into_the_next(grader: CodeGrader):
    tests = make_tests(("", "clean\n"))
    assert judged(grader, "python", "import sys\nsys.modules['math'] = leak = 1\nprint('clean')\n", tests).verdict is (
        Verdict.CORRECT
    )
    source = "import math\nprint('leak' if 'leak' in globals() or math == 1 else 'clean')\n"
    assert judged(grader, "python", source, tests).verdict is Verdict.CORRECT
    stale = '#include <cstdio>\nint main() { puts("clean"); }\n'
    assert judged(grader, "cpp", stale, tests).verdict is Verdict.CORRECT
    assert judged(grader, "cpp", stale.replace("clean", "dirty"), tests).verdict is Verdict.WRONG
    assert judged(grader, "cpp", stale, tests).verdict is Verdict.CORRECT


def test_one_solution_cannot_run_another(grader: CodeGrader):
    tests = make_tests(("", "clean\n"))
    right = '#include <cstdio>\nint main() { puts("clean"); }\n'
    assert judged(grader, "cpp", right, tests).verdict is Verdict.CORRECT
    folders = ["/program", *map(str, pathlib.Path(tempfile.gettempdir()).glob("magistral-jax-*/*/*"))]
    tries = "    try: os.execv(folder + '/program', ['x'])\n    except OSError: pass\n"
    thief = f"import os\nfor folder in {folders}:\n{tries}"
    found = judged(grader, "python", thief, tests)
    assert (found.verdict, found.path) == (Verdict.WRONG, "test 1: 0 tokens, expected 1")


# --- partial reward --------------------------------------------------------------------------------------------------


def test_partial_runs_all_tests():
    source = "x = int(input())\nprint(x if x % 2 else 0)\n"
    tests = make_tests(*((str(i), str(i)) for i in range(1, 7)))
    with CodeGrader(Mechanism.LANDLOCK, CodeConfig(partial=True)) as grader:
        found = judged(grader, "python", source, tests)
    assert found == CodeVerdict(Verdict.WRONG, "test 2: token 1 differs", 3, 6)


# --- tests that are code ---------------------------------------------------------------------------------------------


def code_tests(language: str, *codes: str) -> CodeTests:
    rows = [{"code": code, "language": language} for code in codes]
    return select_tests(Problem("p", "s", "", "code", {"tests": rows}), CONFIG, 0)


PYTHON_ASSERTS = code_tests("python", "assert double(2) == 4", "assert double('a') == 'aa'")
CPP_ASSERTS = code_tests(
    "cpp", "int main() { assert(twice(2) == 4); }", "int main() { assert(twice(0) == 0); return 0; }"
)


@pytest.mark.parametrize(
    ("language", "source", "verdict"),
    [
        ("python", "def double(x):\n    return 2 * x", Verdict.CORRECT),
        ("python", "print('noise')\ndouble = lambda x: x + x", Verdict.CORRECT),
        ("python", "def double(x):\n    return 4", Verdict.RUNTIME_ERROR),
        ("python", "def other(x):\n    return 4", Verdict.RUNTIME_ERROR),
        ("python", "import sys\nsys.exit(0)", Verdict.WRONG),
        ("python", "import os\nos._exit(0)", Verdict.WRONG),
        ("python", "def double(x):\n    raise SystemExit", Verdict.WRONG),
        ("python", "import os\ndef double(x):\n    os._exit(0)", Verdict.WRONG),
        ("cpp", "#include <bits/stdc++.h>\nint twice(int x) { return 2 * x; }", Verdict.CORRECT),
        ("cpp", "int twice(int x) { return 2 * x; }", Verdict.CORRECT),
        ("cpp", "int twice(int x) { return 4; }", Verdict.RUNTIME_ERROR),
        (
            "cpp",
            "#include <bits/stdc++.h>\n#define NDEBUG\n#include <cassert>\nint twice(int x) { return 4; }",
            Verdict.RUNTIME_ERROR,
        ),
        ("cpp", "#include <cstdlib>\nint twice(int x) { exit(0); }", Verdict.WRONG),
        (
            "cpp",
            "#include <cstdlib>\nstruct S { S() { exit(0); } } s;\nint twice(int x) { return 4; }",
            Verdict.WRONG,
        ),
        ("cpp", "int twice(int x) { return 2 * x; }\nint main() {}", Verdict.COMPILE_ERROR),
    ],
)
def test_tests_that_are_code(language: str, source: str, verdict: Verdict, landlock_grader: CodeGrader):
    tests = PYTHON_ASSERTS if language == "python" else CPP_ASSERTS
    assert judged(landlock_grader, language, source, tests).verdict is verdict


def test_code_of_another_language(landlock_grader: CodeGrader):
    found = judged(landlock_grader, "cpp", "int main() {}", PYTHON_ASSERTS)
    assert (found.verdict, found.path) == (Verdict.UNPARSABLE, "language:cpp")


# --- special checkers ------------------------------------------------------------------------------------------------

# Accepts any two numbers with the right sum.
PYTHON_CHECKER = """
import sys
wanted = sum(map(int, open(sys.argv[1]).read().split()))
answer = open(sys.argv[3]).read()
found = open(sys.argv[2]).read()
if found == "confuse":
    sys.exit(3)
if found == "slow":
    while True: pass
sys.exit(0 if answer == "any" and sum(map(int, found.split())) == wanted else "wrong sum")
"""
CPP_CHECKER = """
#include <bits/stdc++.h>
long long sum(const char *path) { std::ifstream f(path); long long x, s = 0; while (f >> x) s += x; return s; }
int main(int count, char **words) {
    std::string found, answer;
    std::getline(std::ifstream(words[2]) >> std::ws, found), std::getline(std::ifstream(words[3]), answer);
    if (found == "confuse") return 3;
    if (found == "slow") for (volatile int x = 0;; x++) {}
    if (answer == "any" && sum(words[1]) == sum(words[2])) return 0;
    std::cerr << "wrong sum";
    return 1;
}
"""


def checked_tests(language: str, source: str) -> CodeTests:
    checker = {"language": language, "source": source}
    return make_tests(("1 2\n", "any"), ("3 4\n", "any"), checker=checker, cpu_seconds=0.5)


@pytest.mark.parametrize(("language", "source"), [("python", PYTHON_CHECKER), ("cpp", CPP_CHECKER)])
def test_a_special_checker(language: str, source: str, grader: CodeGrader):
    tests = checked_tests(language, source)
    swapped = "a, b = map(int, input().split())\nprint(b - 1, a + 1)\n"
    assert judged(grader, "python", swapped, tests) == CodeVerdict(Verdict.CORRECT, "tests", 2, 2)
    found = judged(grader, "python", "print(1, 2)", tests)
    assert (found.verdict, found.path, found.passed) == (Verdict.WRONG, "test 2: rejected by the checker", 1)
    assert "wrong sum" in found.detail
    for word in ("confuse", "slow"):
        found = judged(grader, "python", f"print('{word}', end='')", tests)
        assert (found.verdict, found.path) == (Verdict.SANDBOX_ERROR, "checker"), word


def test_a_checker_that_does_not_compile(landlock_grader: CodeGrader):
    found = judged(landlock_grader, "python", "print(1, 2)", checked_tests("cpp", "int main() { return x; }"))
    assert (found.verdict, found.path) == (Verdict.SANDBOX_ERROR, "checker")
    assert "'x' was not declared" in found.detail


SNOOP = """
import os
found = []
for place in ("/program", {folder!r}):
    for root, _, names in os.walk(place):  # passes over what it may not read
        found += [os.path.join(root, name) for name in names if name in ("answer", "input", "output")]
print(found or "nothing")
"""


def test_a_solution_sees_no_file_of_the_checker(grader: CodeGrader):
    """The checker has run before, and the two folders are neighbours on the host."""
    judged(grader, "python", "print(1, 2)", checked_tests("python", PYTHON_CHECKER))
    source = SNOOP.format(folder=tempfile.gettempdir())
    assert judged(grader, "python", source, make_tests(("", "nothing"))).verdict is Verdict.CORRECT


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_machine_on_which_right_programs_fail_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("magistral_jax.verify.code_compile._MEMORY_MIB", 10)
    grader = CodeGrader(Mechanism.LANDLOCK, CONFIG)
    with pytest.raises(MagistralError, match="code verification does not work here: a right cpp program got compile_"):
        grader.__enter__()


def test_a_missing_compiler_is_noticed_at_once():
    with pytest.raises(MagistralError, match="no C\\+\\+ compiler 'no-such-compiler' on this machine"):
        CodeGrader(Mechanism.LANDLOCK, CodeConfig(compiler="no-such-compiler"))


# --- failures of the machinery ---------------------------------------------------------------------------------------


def failing_runs(monkeypatch: pytest.MonkeyPatch, num_failures: int) -> list[int]:
    """Make the first runs fail as a broken box does; counts all of them."""
    calls: list[int] = []
    run = GraderBoxes.run

    def fail_first(self: GraderBoxes, *args: Any, **kwargs: Any):
        calls.append(len(calls))
        if len(calls) <= num_failures:
            raise BoxError("the runner is gone")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GraderBoxes, "run", fail_first)
    return calls


def test_a_broken_box_is_replaced_once(monkeypatch: pytest.MonkeyPatch, landlock_grader: CodeGrader):
    calls = failing_runs(monkeypatch, 1)
    assert judged(landlock_grader, "python", ADDS, make_tests(*ADD)).verdict is Verdict.CORRECT
    assert len(calls) == 3  # the first test twice


def test_a_box_that_breaks_twice_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch, landlock_grader: CodeGrader):
    failing_runs(monkeypatch, 2)
    found = judged(landlock_grader, "python", ADDS, make_tests(*ADD))
    assert found == CodeVerdict(Verdict.SANDBOX_ERROR, "box", 0, 2, "the runner is gone")
    assert found.verdict.is_infrastructure_failure
    assert judged(landlock_grader, "python", ADDS, make_tests(*ADD)).verdict is Verdict.CORRECT


def test_boxes_are_replaced_now_and_then(monkeypatch: pytest.MonkeyPatch, landlock_grader: CodeGrader):
    monkeypatch.setattr("magistral_jax.verify.code_grade._SOLUTIONS_PER_BOX", 2)
    closed: list[GraderBoxes] = []
    close = GraderBoxes.close

    def count(self: GraderBoxes) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(GraderBoxes, "close", count)
    for _ in range(4):
        assert judged(landlock_grader, "python", "print(3)", make_tests(("", "3"))).verdict is Verdict.CORRECT
    assert len(closed) == 2


def test_a_killed_runner_is_replaced(grader: CodeGrader):
    """Whatever a program manages to break, the next one gets a verdict."""
    hostile = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
    judged(grader, "python", hostile, make_tests(*ADD))
    assert judged(grader, "python", ADDS, make_tests(*ADD)).verdict is Verdict.CORRECT
