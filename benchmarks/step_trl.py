"""TRL's side of `train_step.py`: the loss of its GRPOTrainer on a transformers model (torch, CPU), and AdamW.

python -m venv VENV && VENV/bin/pip install trl torch
"""

import os
import tempfile
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # pyright: ignore[reportMissingImports]
import tokenizers
import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]
from step_side import Workload


def make_step(work: Workload) -> Callable[[], object]:
    """One update: `GRPOTrainer.compute_loss` over the batch as it comes, backward, AdamW."""
    trainer = _make_trainer(work)
    trainer.current_gradient_accumulation_steps = 1  # what its training loop would set
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.settings["learning_rate"], betas=(0.9, 0.95))
    prompt = work.settings["prompt"]
    tokens = torch.from_numpy(work.tokens).long()
    mask = (tokens != 0).long()
    inputs = {
        "prompt_ids": tokens[:, :prompt],
        "prompt_mask": mask[:, :prompt],
        "completion_ids": tokens[:, prompt:],
        "completion_mask": mask[:, prompt:],
        "advantages": torch.from_numpy(work.advantage),
        "old_per_token_logps": torch.from_numpy(work.behavior_logprob[:, prompt:]),
        "num_items_in_batch": mask[:, prompt:].sum(),
    }

    def step() -> object:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _make_trainer(work: Workload) -> trl.GRPOTrainer:
    # The trainer wants a tokenizer, prompts and a reward, none of which the loss reads.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    model = transformers.AutoModelForCausalLM.from_pretrained(work.folder / "model", dtype=torch.float32)
    num = len(work.tokens)
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.0,
        epsilon_high=0.28,
        loss_type="dapo",  # normalised by all completion tokens, as ours
        temperature=1.0,
        per_device_train_batch_size=num,
        num_generations=num,
        report_to=[],
    )
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * num}),
        processing_class=tokenizer,
    )
