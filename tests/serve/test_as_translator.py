"""The service as the endpoint of `magistral-jax translate`: garbage of a random model is told from a translation."""

import json
import pathlib
from typing import Any

from magistral_jax.data.sources import load_problems
from magistral_jax.main import main


def test_garbage_is_told_from_a_translation(start: Any, tmp_path: pathlib.Path, capsys: Any):
    problems = load_problems("templated:sums?language=en&terms=2", 6, 0)
    rows = [{"id": p.id, "problem": p.statement, "answer": p.answer} for p in problems]
    source = tmp_path / "raw.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with start(generation__max_prompt_tokens=900, generation__max_new_tokens=24) as running:
        words = [f"--out={tmp_path / 'out'}", f"--endpoint={running.url}/v1", "--share=1", "--attempts=2"]
        main(["translate", str(source), *words, "--max-tokens=24"])
        metrics = running.http.get("/metrics").text
    assert 'magistral_requests_total{route="/v1/chat/completions",status="200"} 12.0' in metrics
    captured = capsys.readouterr()
    assert "6 problems are translated by tiny" in captured.err
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept_in_english.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == [row["id"] for row in rows]
    assert {row["reason"] for row in kept} <= {"cut off", "placeholder lost", "empty"}
    after = [json.loads(line) for line in (tmp_path / "out" / "translated.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in after] == [row["problem"] for row in rows]
