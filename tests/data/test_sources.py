"""Problem sources: what rows become, what is said about broken ones, and that training and evaluation are disjoint."""

import json
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.data.sources import held_out, load_problems
from magistral_jax.records import Problem

ROWS = [
    {"problem": "1+1", "answer": "2", "id": "a", "level": 3},
    {"question": "1+2", "answer": 3},
    {"statement": "Print 4.", "kind": "code", "tests": ["4"]},
]


def write_jsonl(path: pathlib.Path, rows: list[dict[str, Any]]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- files -----------------------------------------------------------------------------------------------------------


def test_rows_of_json_lines(tmp_path: pathlib.Path):
    assert load_problems(write_jsonl(tmp_path / "math.jsonl", ROWS), 0, 0) == [
        Problem("a", "1+1", "2", "math", {"level": 3}),
        Problem("math:2", "1+2", "3", "math", {}),
        Problem("math:3", "Print 4.", "", "code", {"tests": ["4"]}),
    ]


def test_a_row_with_tests_and_without_an_answer_is_code(tmp_path: pathlib.Path):
    tests = [{"input": "1", "output": "2"}]
    rows = [
        {"problem": "a", "tests": tests},
        {"problem": "b", "tests": tests, "answer": "2"},
        {"problem": "c", "tests": tests, "answer": None, "kind": None},
        {"problem": "d", "tests": tests, "kind": "math", "answer": "2"},
    ]
    problems = load_problems(write_jsonl(tmp_path / "mixed.jsonl", rows), 0, 0)
    assert [problem.kind for problem in problems] == ["code", "math", "code", "math"]
    assert all(problem.extra == {"tests": tests} for problem in problems)


def test_tests_of_parquet_rows(tmp_path: pathlib.Path):
    tests = [{"input": "1\n", "output": "2\n"}]
    table = pa.table({"problem": ["a", "1+1"], "tests": [tests, None], "answer": [None, "2"]})
    pyarrow.parquet.write_table(table, tmp_path / "mixed.parquet")
    code, math = load_problems(str(tmp_path / "mixed.parquet"), 0, 0)
    assert (code.kind, code.answer, code.extra) == ("code", "", {"tests": tests})
    assert (math.kind, math.answer, math.extra) == ("math", "2", {"tests": None})


def test_blank_lines_are_passed_over_and_counted(tmp_path: pathlib.Path):
    path = tmp_path / "math.jsonl"
    path.write_text('\n{"problem": "é", "answer": "2"}\n\n', encoding="utf-8")
    assert load_problems(str(path), 0, 0) == [Problem("math:2", "é", "2")]


def test_rows_of_parquet(tmp_path: pathlib.Path):
    path = tmp_path / "math.parquet"
    pyarrow.parquet.write_table(pa.table({"problem": ["1+1", "1/2"], "answer": ["2", "0.5"], "level": [3, None]}), path)
    assert load_problems(str(path), 0, 0) == [
        Problem("math:1", "1+1", "2", "math", {"level": 3}),
        Problem("math:2", "1/2", "0.5", "math", {"level": None}),
    ]


def test_num_takes_a_seeded_sample_in_file_order(tmp_path: pathlib.Path):
    source = write_jsonl(tmp_path / "m.jsonl", [{"problem": f"{i}", "answer": i} for i in range(100)])
    ids = [int(problem.answer) for problem in load_problems(source, 10, 0)]
    assert ids == sorted(ids) == [int(problem.answer) for problem in load_problems(source, 10, 0)]
    assert len(set(ids)) == 10
    assert ids != [int(problem.answer) for problem in load_problems(source, 10, 1)]
    assert len(load_problems(source, 1000, 0)) == 100


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"problem": "x", ', "not valid JSON: "),
        ('{"problem": "\\ud8', "not valid JSON: "),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"problem": "x", "solution": "y"}', "no answer; expected a column answer, found: problem, solution"),
        ('{"problem": "x", "answer": ""}', "no answer; expected a column answer, found: problem, answer"),
        ('{"problem": "x", "answer": NaN}', "no answer; expected a column answer, found: problem, answer"),
        (
            '{"text": "x", "answer": "y"}',
            "no statement; expected a column problem, question, statement, found: text, answer",
        ),
        ('{"problem": ["x"], "answer": "y"}', "problem is of type list; expected text"),
        ('{"problem": "x", "answer": ["y"]}', "answer is of type list; expected text or a number"),
        ('{"problem": "x", "answer": true}', "answer is of type bool; expected text or a number"),
        ('{"problem": "x", "answer": "y", "kind": "prose"}', "kind is 'prose'; expected math or code"),
    ],
)
def test_a_broken_row_is_named_with_its_line(line: str, expected: Any, tmp_path: pathlib.Path, refuses: Any):
    path = tmp_path / "m.jsonl"
    path.write_text('{"problem": "x", "answer": "y"}\n\n' + line + "\n")
    with refuses(f"{path}, line 3: {expected}", ""):
        load_problems(str(path), 0, 0)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: pathlib.Path, refuses: Any):
    (tmp_path / "m.jsonl").write_bytes(b'{"problem": "\xff"}')
    with refuses(f"{tmp_path / 'm.jsonl'}, line 1: not valid JSON: ", ""):
        load_problems(str(tmp_path / "m.jsonl"), 0, 0)


def test_two_rows_of_one_id_are_named(tmp_path: pathlib.Path, refuses: Any):
    row = {"problem": "x", "answer": "y", "id": "same"}
    source = write_jsonl(tmp_path / "m.jsonl", [row, row])
    with refuses(f"{source}: rows 1 and 2 have the same id 'same'"):
        load_problems(source, 0, 0)


def test_files_that_cannot_be_read_are_named(tmp_path: pathlib.Path, refuses: Any):
    path = tmp_path / "none.jsonl"
    with refuses(f"{path}: no such file; a source is a .jsonl file, a .parquet file or reasoning-gym:NAME?key=value&…"):
        load_problems(str(path), 0, 0)
    path.write_text("\n\n")
    with refuses(f"{path}: the file has no rows"):
        load_problems(str(path), 0, 0)
    (tmp_path / "m.csv").write_text("problem,answer\n")
    with refuses(f"{tmp_path / 'm.csv'}: expected a file that ends in .jsonl or .parquet"):
        load_problems(str(tmp_path / "m.csv"), 0, 0)
    (tmp_path / "m.parquet").write_bytes(b"PAR1 not really")
    with refuses(f"{tmp_path / 'm.parquet'}: not a readable Parquet file: ", ""):
        load_problems(str(tmp_path / "m.parquet"), 0, 0)


# --- generators ------------------------------------------------------------------------------------------------------

CHAIN = "reasoning-gym:chain_sum?min_terms=3&max_terms=5&min_digits=1&max_digits=1"


def test_generated_problems():
    problems = load_problems(CHAIN, 20, 0)
    assert [problem.id for problem in problems] == [f"chain_sum:0:{i}" for i in range(20)]
    assert problems == load_problems(CHAIN, 20, 0)
    for problem in problems:
        expression = problem.extra["metadata"]["expression"]
        assert problem.statement.endswith(f"{expression} =")
        assert 3 <= len(expression.split()[::2]) <= 5
        assert problem.answer == str(sum(int(term) for term in expression.replace("- ", "-").replace("+ ", "").split()))


def test_neighbouring_seeds_share_no_stream():
    """reasoning-gym's item i of seed s is item i − 1 of seed s + 1: passed on as they are, 19 of 20 would be equal."""
    first, second = (
        [problem.statement for problem in load_problems("reasoning-gym:chain_sum?min_digits=4", 20, seed)]
        for seed in (0, 1)
    )
    assert set(first).isdisjoint(second)


def test_values_are_parsed(refuses: Any):
    problems = load_problems("reasoning-gym:chain_sum?allow_negation=true&min_terms=2&max_terms=2", 40, 0)
    assert any("-" in problem.extra["metadata"]["expression"].split()[0] for problem in problems)
    with refuses("reasoning-gym:chain_sum?min_terms=two: generator chain_sum refuses its parameters: ", ""):
        load_problems("reasoning-gym:chain_sum?min_terms=two", 1, 0)


@pytest.mark.parametrize(
    ("source", "num", "expected"),
    [
        ("chain_sums", 5, "reasoning-gym has no generator 'chain_sums'; perhaps you meant: chain_sum"),
        (
            "chain_sum?max_term=3",
            5,
            "generator chain_sum has no parameter 'max_term'; perhaps you meant: max_terms, min_terms",
        ),
        (
            "chain_sum?qqq=3",
            5,
            "generator chain_sum has no parameter 'qqq'; perhaps you meant: min_terms, max_terms, min_digits, "
            "max_digits, allow_negation",
        ),
        ("chain_sum?seed=3", 5, "generator chain_sum has no parameter 'seed'"),
        (
            "chain_sum?min_terms=9&max_terms=2",
            5,
            "generator chain_sum refuses its parameters: max_terms must be >= min_terms",
        ),
        ("chain_sum", 0, "a generator needs a number of problems (data.num_train, …), found 0"),
    ],
)
def test_a_generator_that_does_not_exist_or_fit_is_named(source: str, num: int, expected: Any, refuses: Any):
    with refuses(f"reasoning-gym:{source}: {expected}", ""):
        load_problems(f"reasoning-gym:{source}", num, 0)


# --- disjointness ----------------------------------------------------------------------------------------------------


def test_evaluation_problems_leave_the_training_set():
    train = [Problem("1", "What is  2+2?", "4"), Problem("2", "What is 2+3?", "5")]
    evaluation = [Problem("e", "what is 2+2?\n", "4")]
    assert held_out(train, evaluation) == ([train[1]], 1)
    assert held_out(train, []) == (train, 0)


def test_nothing_left_to_train_on_is_an_error(refuses: Any):
    problems = load_problems(CHAIN, 3, 0)
    with refuses("all 3 training problems are also evaluation problems; use another source or seed for one"):
        held_out(problems, problems)


@given(st.integers(0, 2**31), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_generated_sets_are_disjoint_after_holding_out(train_seed: int, evaluation_seed: int):
    """Sums of two digits repeat often, so that the overlap is never empty by luck."""
    source = "reasoning-gym:chain_sum?max_terms=2&min_digits=1&max_digits=1"
    train, evaluation = load_problems(source, 300, train_seed), load_problems(source, 30, evaluation_seed)
    kept, num_removed = held_out(train, evaluation)
    assert {problem.statement for problem in kept}.isdisjoint(problem.statement for problem in evaluation)
    assert len(kept) + num_removed == 300
    assert num_removed > 0
