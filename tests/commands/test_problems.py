"""Training problems from the settings: mixtures, what is left out, and the sentences about mistakes."""

import collections
import json
import pathlib
from typing import Any

import pytest

from magistral_jax.commands.problems import load_training_problems
from magistral_jax.config import load
from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.records import MagistralError, Problem


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[str, str]:
    easy = [{"problem": f"1+{i}", "answer": 1 + i, "hint": "count"} for i in range(3)]
    hard = [{"problem": f"{i}*{i}", "answer": i * i} for i in range(5)]
    return write(tmp_path / "easy.jsonl", easy), write(tmp_path / "hard.jsonl", hard)


def test_a_mixture_has_its_shares_in_every_stretch(files: tuple[str, str]):
    easy, hard = files
    config = load(["--data.mixture", f"3 {easy}", f"1 {hard}", "--data.system_prompt=none"])
    training = load_training_problems(config, [])
    assert [problem.id for problem in training.problems][2:4] == ["easy:3", "hard:1"]
    assert training.problems[0].extra == {"hint": "count"}
    loader = training.loader(config, ByteTokenizer())
    assert len(loader) == 8
    drawn = [loader.prompt_at(cursor).problem.id.split(":")[0] for cursor in range(400)]
    for start in range(0, 400, 40):
        assert collections.Counter(drawn[start : start + 40]) == {"easy": 30, "hard": 10}
    # Each source has epochs of its own: the five hard ones come round before one of them comes again.
    hard_ids = [loader.prompt_at(c).problem.id for c in range(400) if drawn[c] == "hard"]
    assert all(len(set(hard_ids[start : start + 5])) == 5 for start in range(0, 100, 5))
    again = training.loader(config, ByteTokenizer())
    assert [again.prompt_at(c).problem.id for c in (399, 7)] == [loader.prompt_at(c).problem.id for c in (399, 7)]

    other = load(["--data.mixture", f"2 {easy}", f"1 {hard}", "--data.system_prompt=none"])
    changed = load_training_problems(other, []).loader(other, ByteTokenizer())
    assert changed.fingerprint != loader.fingerprint  # or a resume would go on in another order


def test_what_is_left_out_is_written_down(files: tuple[str, str], tmp_path: pathlib.Path, capsys: Any):
    _, hard = files
    keep_out = write(tmp_path / "keep.jsonl", [{"problem": "2*2", "answer": 4}])
    with pathlib.Path(hard).open("a") as file:
        file.write('{"problem": "0*0", "answer": 0}\n{"problem": "7"}\nnot json\n')
    words = [f"--data.train={hard}", "--data.on_bad_row=drop", "--data.duplicates=drop", "--data.keep_out", keep_out]
    training = load_training_problems(load(words), [Problem("e", "3*3", "9")])
    assert [problem.statement for problem in training.problems] == ["0*0", "1*1", "4*4"]
    assert "left out: 2 bad row, 2 in evaluation, 1 duplicate" in capsys.readouterr().err
    training.report(tmp_path)
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in removed] == ["bad row"] * 2 + ["duplicate"] + ["in evaluation"] * 2
    assert removed[1]["detail"].startswith(f"{hard}, line 8: not valid JSON")
    assert removed[3] == {"id": "hard:3", "reason": "in evaluation", "detail": "same statement as keep:1"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.mixture", "EASY", "1 HARD"], "`data.mixture` has the part `EASY`; expected a weight above 0"),
        (["--data.mixture", "0 EASY", "1 HARD"], "`data.mixture` has the part `0 EASY`; expected a weight above 0"),
        (["--data.mixture", "1 EASY", "1 EASY2"], "EASY2: has the id 'easy:1', and so has EASY"),
        ([], "`data.train` is empty; expected a problem file"),
    ],
)
def test_mistakes_are_named(words: list[str], sentence: str, files: tuple[str, str], tmp_path: pathlib.Path):
    easy, hard = files
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / "easy.jsonl"
    copy.write_text(pathlib.Path(easy).read_text())
    names = {"EASY2": str(copy), "EASY": easy, "HARD": hard}
    for name, path in names.items():
        words, sentence = [word.replace(name, path) for word in words], sentence.replace(name, path)
    with pytest.raises(MagistralError) as error:
        load_training_problems(load(words), [])
    assert str(error.value).startswith(sentence)


def test_nothing_left_to_train_on_is_an_error(files: tuple[str, str]):
    evaluation = [Problem(f"e{i}", f"1+{i}", "0") for i in range(3)]
    with pytest.raises(MagistralError, match=r"^all 3 training problems are also evaluation problems"):
        load_training_problems(load([f"--data.train={files[0]}"]), evaluation)
    config = load(["--data.mixture", f"1 {files[0]}", f"1 {files[1]}", "--data.system_prompt=none"])
    with pytest.raises(MagistralError, match=r"^source 1 of data.mixture has no prompts left after filtering"):
        load_training_problems(config, evaluation).loader(config, ByteTokenizer())
