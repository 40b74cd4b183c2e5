"""The report of a run at any stage, with completions that try to break the page."""

import html.parser
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from magistral_jax.config import Config, dump
from magistral_jax.studies.report import pair_rollouts, write_report

HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> & \x00 \u202e \ud800"


class Page(html.parser.HTMLParser):
    """Tags and text of a page, and whether every tag was closed."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def rollout(step: int, problem: str, **entries: Any) -> dict[str, Any]:
    return {
        "step": step,
        "problem": problem,
        "prompt": "1+1?",
        "completion": f"thought of step {step}",
        "verdict": "wrong",
        "reward": 0.1,
        **entries,
    }


def fill(folder: pathlib.Path, *, num_steps: int, rollouts: list[dict[str, Any]] | None = None) -> None:
    metrics = [
        {"step": s, "time": 0.0, "reward": s / 10, "completion_length": 9.0 + s} for s in range(1, num_steps + 1)
    ]
    (folder / "config.json").write_text(dump(Config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts or []))


def test_a_finished_run_has_every_part(tmp_path: pathlib.Path):
    fill(tmp_path, num_steps=3, rollouts=[rollout(1, "a"), rollout(3, "a", verdict="correct")])
    scores = {"num_problems": 50, "intervals": {"pass_at_1": [0.3, 0.5]}}
    summary = {
        "eval_before": {"pass_at_1": 0.4, "maj_at_8": 0.5, **scores},
        "eval_after": {"pass_at_1": 0.75, "maj_at_8": 0.875, **scores},
        "steps": 3,
        "wall_seconds": 512.3,
        "mean_staleness": 1.25,
        "generator_idle_share": 0.02,
        "dropped": {"zero_variance": 7},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for text in (
        "40.0 % → 75.0 %",
        "0.10 → 0.30",
        "8 min 32 s",
        "0.3 to 0.5",
        "dropped.zero_variance",
        "loss.eps_high",
    ):
        assert text in page.text
    assert "thought of step 1" in page.text
    assert "thought of step 3" in page.text
    images = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3  # evaluation, reward, length
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in images)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["evaluation.png", "length.png", "reward.png"]


def test_a_completion_cannot_break_out_of_the_page(tmp_path: pathlib.Path):
    entries = {"completion": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "reference": HOSTILE, "verdict": HOSTILE}
    folder = tmp_path / "<script>run"
    folder.mkdir()
    fill(folder, num_steps=1, rollouts=[rollout(1, HOSTILE, **entries), rollout(2, HOSTILE, **entries)])
    (folder / "summary.json").write_text(json.dumps({"dropped": {HOSTILE: HOSTILE}, "steps": HOSTILE}))
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object"}
    assert all((attrs.get("src") or "data:").startswith("data:") for _, attrs in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text
    assert "\x00" not in text
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.mark.parametrize("num_steps", [0, 1, 30])
def test_a_run_of_any_length_without_a_summary(tmp_path: pathlib.Path, num_steps: int):
    fill(tmp_path, num_steps=num_steps, rollouts=[rollout(1, "a")] * bool(num_steps))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert f"{num_steps} step{'s' * (num_steps != 1)}, unfinished" in page.text
    assert ("thought of step 1" in page.text) == bool(num_steps)


def test_an_empty_or_broken_folder_still_gives_a_page(tmp_path: pathlib.Path):
    assert "0 steps, unfinished" in Page(write_report(tmp_path).read_text()).text
    (tmp_path / "summary.json").write_text('{"steps": 3')
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1}\n{"st')
    assert "1 step, unfinished" in Page(write_report(tmp_path).read_text()).text


def test_a_long_completion_keeps_its_ends(tmp_path: pathlib.Path):
    fill(tmp_path, num_steps=1, rollouts=[rollout(1, "a", completion="BEGIN" + "x" * 100_000 + "END")])
    page = Page(write_report(tmp_path).read_text())
    assert "BEGIN" in page.text
    assert "END" in page.text
    assert "94508 characters left out" in page.text  # 100,008 - 4,000 - 1,500


def test_pairs_are_the_first_and_last_of_a_problem_furthest_apart_first():
    rollouts = [
        rollout(step, problem, completion=f"{i}")
        for i, (step, problem) in enumerate([(1, "a"), (1, "a"), (1, "b"), (2, "c"), (3, "b"), (4, "a"), (4, "a")])
    ]
    pairs = pair_rollouts(rollouts)
    assert [(early["completion"], late and late["completion"]) for early, late in pairs] == [("0", "6"), ("2", "4")]
    assert pair_rollouts(rollouts, num_pairs=1) == pairs[:1]


def test_without_a_repeated_problem_first_and_last_are_paired():
    rollouts = [rollout(step, f"p{step}") for step in range(1, 10)]
    pairs = pair_rollouts(rollouts, num_pairs=3)
    assert [(early["step"], late and late["step"]) for early, late in pairs] == [(1, 9), (2, 8), (3, 7)]


def test_completions_of_one_step_stand_alone():
    rollouts = [rollout(1, "a"), rollout(1, "b")]
    assert pair_rollouts(rollouts) == [(rollouts[0], None), (rollouts[1], None)]
    assert pair_rollouts([]) == []


def test_pairing_remembers_a_bounded_number_of_problems():
    def stream() -> Any:
        for step in range(1, 3001):
            yield rollout(step, f"p{step}")
        yield rollout(3001, "p1")

    (early, late), *others = pair_rollouts(stream())
    assert (early["step"], late and late["step"]) == (1, 3001)
    assert others == []


def test_a_report_needs_no_jax():
    program = "import sys, magistral_jax.studies.report; assert not {'jax', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
