"""lm-evaluation-harness against the service, beside the same log-likelihoods by transformers.

    pip install 'lm-eval[api]'        # 40 packages: not part of any extra
    python benchmarks/serve_lm_eval.py --model models/smollm2 [--problems 20]

The harness is a client like any other (`local-completions`). Two small tasks are made here, so that nothing is fetched:
sums with four answers to choose from (log-likelihoods of the prompt's tokens) and the same sums to complete (greedy).
The log-likelihood of every choice is computed by transformers as well; the largest difference is reported, and more
than 0.01 nats, or another choice taken for greedy, fails.
"""

import dataclasses
import importlib
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
import transformers
import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    """What is asked."""

    model: pathlib.Path
    """Model folder with a tokenizer that transformers reads."""
    problems: int = 20
    """Sums of each task."""
    concurrent: int = 8
    """Requests under way at one time."""


def make_tasks(folder: pathlib.Path, num_problems: int) -> list[dict[str, Any]]:
    """The two tasks, as the harness reads them."""
    rng = random.Random(0)
    rows = []
    for _ in range(num_problems):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        choices = rng.sample(sorted({a + b, a + b + 1, a + b - 1, a + b + 2}), 4)
        rows.append({"a": a, "b": b, "choices": [f" {c}" for c in choices], "answer": choices.index(a + b)})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
        "doc_to_text": "2 + 3 = 5\n4 + 4 = 8\n{{a}} + {{b}} =",
        "num_fewshot": 0,
    }
    choose = shared | {
        "task": "sums_choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    complete = shared | {
        "task": "sums_complete",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    return [choose, complete]


def evaluate(args: Args, url: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the harness finds."""
    settings = {
        "model": "served",
        "base_url": f"{url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(args.model),
        "num_concurrent": args.concurrent,
        "max_length": 512,
    }
    lm_eval = importlib.import_module("lm_eval")  # in no extra of this project
    return lm_eval.simple_evaluate(model="local-completions", model_args=settings, tasks=tasks, bootstrap_iters=0)


def reference(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """(log-likelihood, whether greedy decoding writes it) by transformers."""
    ids = tokenizer(context + continuation, return_tensors="pt", add_special_tokens=False).input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logprobs = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
    targets = ids[0, start:]
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def wait_until_ready(lines: Iterable[str]) -> str:
    """The service's address, once it says it."""
    said = []
    for line in lines:
        said.append(line)
        if found := re.search(r"at (http://\S+/v1):", line):
            return found[1]
    raise SystemExit("".join(said))


def main(args: Args) -> None:
    """Serve, evaluate, compare."""
    words = [sys.executable, "-c", "from magistral_jax.main import main; main()", "serve"]
    words += [f"--policy.path={args.model}", "--serve.port=0", "--serve.model_name=served", "--serve.warm_up=false"]
    words += ["--generation.num_slots=8", "--generation.max_prompt_tokens=512"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            url = wait_until_ready(process.stderr)
            found = evaluate(args, url, make_tasks(pathlib.Path(folder), args.problems))
        finally:
            process.kill()
            process.wait()

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    gaps, disagreements = [], 0
    for sample in found["samples"]["sums_choose"]:
        for request, answer in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            value, is_greedy = reference(model, tokenizer, *request)
            gaps.append(abs(value - float(answer[0])))
            disagreements += is_greedy != answer[1]
    result = {
        "choose_accuracy": found["results"]["sums_choose"]["acc,none"],
        "complete_exact_match": found["results"]["sums_complete"]["exact_match,none"],
        "log_likelihoods": len(gaps),
        "largest_gap_nats": max(gaps),
        "greedy_disagreements": disagreements,
    }
    print(json.dumps(result), flush=True)
    sys.exit(0 if max(gaps) < 0.01 and not disagreements else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
