"""Hugging Face transformers 5 on the CPU as the other side: `generate` on padded batches, and continuous batching.

    pip install "transformers>=5" torch

Everything that is timed is the library's own code, float32, scaled-dot-product attention, plain sampling at
temperature 1. `generate` gets a criterion that ends each row at its own limit: the row yields nothing more, the batch
goes on until its longest ends. Continuous batching takes a limit and stop ids with each request.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import decode_work
import numpy as np
import torch
import transformers
from decode_work import Work

_PAD_ID = 0


def _load(folder: pathlib.Path) -> Any:
    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.as_tensor(tokens.astype(np.int64))).logits.numpy()

    decode_work.check_probe(folder, "transformers", logits)
    return model


def _sampling(**more: Any) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=_PAD_ID, **more
    )


class _OwnLimits(transformers.StoppingCriteria):
    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = torch.as_tensor(lengths)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] >= self._lengths


def make_generate(folder: pathlib.Path, work: Work, batch: int) -> Callable[[], list[np.ndarray]]:
    """A run over all requests, `batch` at a time."""
    model = _load(folder)
    num_prompt = work.prompts.shape[1]
    eos = list(work.stop_ids) or None

    def run() -> list[np.ndarray]:
        completions: list[np.ndarray] = []
        for start in range(0, len(work.prompts), batch):
            prompts = torch.as_tensor(work.prompts[start : start + batch].astype(np.int64))
            limits = work.limits[start : start + batch]
            with torch.inference_mode():
                output = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    generation_config=_sampling(max_new_tokens=int(limits.max()), eos_token_id=eos),
                    stopping_criteria=transformers.StoppingCriteriaList([_OwnLimits(num_prompt + limits)]),
                )
            completions += list(output[:, num_prompt:].numpy())
        return completions

    return run


def make_continuous(folder: pathlib.Path, work: Work, batch: int) -> Callable[[], list[np.ndarray]]:
    """A run over all requests at once, at most `batch` of them at one time, through its manager."""
    model = _load(folder)
    page = 64
    settings = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=(batch + 8) * -(-(work.prompts.shape[1] + work.longest) // page),
        max_batch_tokens=512 + batch,
        max_requests_per_batch=batch,
        seed=0,
    )
    eos = list(work.stop_ids) or -1

    def run() -> list[np.ndarray]:
        completions: dict[str, np.ndarray] = {}
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(
                generation_config=_sampling(max_new_tokens=work.longest, eos_token_id=eos),
                continuous_batching_config=settings,
                timeout=60,
            ) as manager,
        ):
            for index, (prompt, limit) in enumerate(zip(work.prompts.tolist(), work.limits.tolist(), strict=True)):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=limit, eos_token_id=eos)
            while len(completions) < len(work.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(f"request {result.request_id}: {result.error}")
                    completions[result.request_id] = np.asarray(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("the continuous batching manager ended before its requests did")
        return [completions[str(index)] for index in range(len(work.prompts))]

    return run
