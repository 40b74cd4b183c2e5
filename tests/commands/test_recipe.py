"""The whole chain at toy size: a teacher's traces, fine-tuning on them, reinforcement learning after it."""

import json
import pathlib
from typing import Any

import pytest

from magistral_jax.main import main


@pytest.fixture
def recipe(tiny: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    """A student that only ever says 1, 2, 3 or 4, and problems whose answer is 7, which the teacher knows to say."""
    problems = tmp_path / "problems.jsonl"
    rows = [{"problem": f"Which digit? {i}", "answer": 7, "id": i} for i in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"data.train": problems, "data.num_train": 0, "data.evaluation": "", "schedule.num_steps": 1}
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
folder = "{tmp_path}/runs"
[settings]
{tiny.toml(shared)}
[steps.traces]
command = "traces"
policy.path = "{tiny.model("5678")}"
[steps.sft]
command = "sft"
per_seed = true
policy.path = "{tiny.model("1234")}"
sft.traces = "{{traces}}/traces.jsonl"
sft.num_updates = 40
sft.batch_size = 8
optimizer.learning_rate = 1e-2
data.evaluation = "{problems}"
[steps.rl]
command = "train"
per_seed = true
policy.path = "{{sft}}/policy"
data.train = "{tiny.sums}"
data.num_train = 60
data.evaluation = "{problems}"
[variants]
"SFT" = "sft"
"SFT + RL" = "rl"
""")
    return path


def test_traces_of_a_teacher_make_a_student_that_is_trained_on(
    recipe: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    runs, words = tmp_path / "runs", ["recipe", str(recipe), "--seeds", "5"]
    main(words)
    table = capsys.readouterr().out
    scores = json.loads((runs / "seed5/sft/evaluation_after.json").read_text())
    assert scores["pass_at_1"] > 0.5  # it knew none: what the teacher said has been learnt
    assert json.loads((runs / "seed5/rl/evaluation_before.json").read_text()) == scores  # RL began with what SFT left
    assert (runs / "seed5/rl/policy/model.safetensors").exists()
    assert table.splitlines()[2].startswith(f"| SFT | 5 | {scores['pass_at_1']:.3f} (")
    assert table.splitlines()[3].startswith("| SFT + RL | 5 | ")
    assert "Shared by all seeds: traces " in table
    assert (runs / "table.md").read_text() == table

    written = {path: path.stat().st_mtime_ns for path in runs.glob("**/metrics.jsonl")}
    main([*words, "--variant", "SFT"])
    assert capsys.readouterr().out == table  # of all that is there; nothing is done twice
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_every_mistake_is_found_before_the_first_step(
    recipe: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    good, words = recipe.read_text(), ["recipe", str(recipe)]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "has no variant `sft`; expected one of SFT, SFT + RL." in refused("--variant", "sft")
    recipe.write_text(good.replace("sft.batch_size = 8", "sft.batchsize = 8"))
    assert "step sft: command line: unknown setting `sft.batchsize`" in refused()
    recipe.write_text(good.replace("sft.batch_size = 8", "sft.batch_size = 0"))
    assert "step sft: `sft.batch_size` is 0" in refused()
    recipe.write_text(good.replace(f'data.evaluation = "{tmp_path}/problems.jsonl"', ""))
    assert "step sft: `data.evaluation` is empty" in refused()
    recipe.write_text(good.replace("talker_5678", "nobody"))
    assert "nobody" in refused()
    assert not (tmp_path / "runs/traces").exists()
