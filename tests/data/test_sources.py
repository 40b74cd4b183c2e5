"""Problem sources: what rows become, what is said about broken ones, and that training and evaluation are disjoint."""

import json
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from magistral_jax.data.rows import SOURCES
from magistral_jax.data.sources import load_problems
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
            '{"title": "x", "answer": "y"}',
            "no statement; expected a column problem, question, statement, prompt, text, found: title, answer",
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
    with refuses(f"{source}, line 2: has the id 'same', and so has {source}, line 1"):
        load_problems(source, 0, 0)


def test_files_that_cannot_be_read_are_named(tmp_path: pathlib.Path, refuses: Any):
    path = tmp_path / "none.jsonl"
    with refuses(f"{path}: no such file; a source is {SOURCES}"):
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


# --- bad rows that are dropped ----------------------------------------------------------------------------------------


def test_bad_rows_are_dropped_with_a_sentence_each(tmp_path: pathlib.Path):
    path = tmp_path / "m.jsonl"
    lines = [
        b'{"problem": "1+1", "answer": "2", "id": "a"}',
        b'{"problem": "\xe9t\xe9", "answer": "2"}',  # Latin-1 in a file of UTF-8
        b'{"problem": "1+2", "answer": " "}',
        b'{"problem": "' + b"x" * 2**20 + b'", "answer": "2"}',
        b'{"problem": "1+3", "answer": "4", "id": "a"}',
        b'{"title": "1+4", "answer": "5"}',
        b"[" * 100_000,
        b'{"problem": "1+5", "answer": "6"}',
    ]
    path.write_bytes(b"\n".join(lines))
    said: list[str] = []
    problems = load_problems(str(path), 0, 0, max_statement=1000, on_bad_row=said.append)
    assert [(problem.id, problem.answer) for problem in problems] == [("a", "2"), ("m:8", "6")]
    assert [sentence.removeprefix(f"{path}, ").split(":")[0] for sentence in said] == [
        f"line {number}" for number in range(2, 8)
    ]
    for sentence, part in zip(
        said,
        (
            "not valid JSON",
            "no answer",
            "problem has 1048576 characters; at most 1000",
            "has the id 'a'",
            "no statement",
        ),
        strict=False,
    ):
        assert part in sentence
        assert len(sentence) < 300


def test_a_file_of_nothing_but_bad_rows_is_an_error(tmp_path: pathlib.Path, refuses: Any):
    source = write_jsonl(tmp_path / "m.jsonl", [{"problem": "x"}])
    with refuses(f"{source}: no row can be used"):
        load_problems(source, 0, 0, on_bad_row=lambda sentence: None)


# --- dataset folders --------------------------------------------------------------------------------------------------


def saved(folder: pathlib.Path, answers: list[str]):
    """What `Dataset.save_to_disk` writes: two Arrow streams and their list."""
    folder.mkdir(parents=True)
    names = []
    for shard, answer in enumerate(answers):
        table = pa.table({"problem": [f"{folder.name} {shard}"], "answer": [answer], "level": [shard]})
        names.append(f"data-{shard:05}-of-{len(answers):05}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_that_was_saved_to_disk(tmp_path: pathlib.Path):
    saved(tmp_path / "sums", ["1", "2"])
    problems = load_problems(str(tmp_path / "sums"), 0, 0)
    assert [(p.statement, p.answer, p.extra) for p in problems] == [
        ("sums 0", "1", {"level": 0}),
        ("sums 1", "2", {"level": 1}),
    ]


def test_the_splits_of_a_saved_folder(tmp_path: pathlib.Path, refuses: Any):
    folder = tmp_path / "sums"
    for split in ("train", "test"):
        saved(folder / split, ["1"])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (problem,) = load_problems(f"{folder}?split=test", 0, 0)
    assert problem.statement == "test 0"
    with refuses(f"{folder}: has the splits train, test; name one, as in {folder}?split=train"):
        load_problems(str(folder), 0, 0)
    with refuses(f"{folder}: has no split 'dev'; there are train, test"):
        load_problems(f"{folder}?split=dev", 0, 0)
    with refuses(f"{folder}?part=test: a dataset folder has no parameter 'part'; expected split"):
        load_problems(f"{folder}?part=test", 0, 0)


def test_a_copy_of_a_repository(tmp_path: pathlib.Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("A dataset.")
    for shard in range(2):
        table = pa.table({"question": [f"1+{shard}"], "answer": [1 + shard]})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"train-{shard:05}-of-00002.parquet")
    problems = load_problems(f"{tmp_path}?split=train", 0, 0)
    assert [(problem.statement, problem.answer) for problem in problems] == [("1+0", "1"), ("1+1", "2")]
    assert load_problems(str(tmp_path), 0, 0) == problems


def test_a_folder_that_is_no_dataset_is_named(tmp_path: pathlib.Path, refuses: Any):
    with refuses(f"{tmp_path}: not a dataset folder; expected what `save_to_disk` writes", ".parquet"):
        load_problems(str(tmp_path), 0, 0)
    (tmp_path / "state.json").write_text("{}")
    with refuses(f"{tmp_path / 'state.json'}: names no data files; the dataset is damaged"):
        load_problems(str(tmp_path), 0, 0)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "data.arrow").write_bytes(b"ARROW1 not really")
    with refuses(f"{tmp_path / 'data.arrow'}: not a readable Arrow stream: ", ""):
        load_problems(str(tmp_path), 0, 0)
