"""An endless, seeded order of prompts that is indexed by an integer; in: Problems, out: Prompts.

The schedule keeps the cursor, so there is no iterator to save, no thread, and no state but one number: prompt `c` of a
run is a function of (problems, seed, c). The fingerprint tells whether a resumed run has the same ones.
"""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import grain

from magistral_jax.records import MagistralError, Problem, Prompt


class PromptLoader:
    """Prompts in random order, each one once per epoch, reshuffled every epoch; of a mixture, part by part."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, parts: Sequence[tuple[float, int]] = ()) -> None:
        """Make the order.

        Args:
          prompts: Of one epoch, in any fixed order.
          seed: Of the order, taken modulo 2³².
          parts: Of a mixture: the weight of each source and the number of its prompts, which stand together in
            `prompts`. Every stretch of the order has the sources in these shares, and each source has epochs of its
            own.

        Raises:
          MagistralError: There is no prompt, or a part has none.
        """
        if not prompts:
            raise MagistralError("there are no prompts to draw from: the problem source is empty after filtering")
        for number, (_, size) in enumerate(parts, 1):
            if not size:
                raise MagistralError(f"source {number} of data.mixture has no prompts left after filtering")
        self.prompts = list(prompts)
        self.parts = parts or [(1.0, len(prompts))]
        weights = [weight for weight, _ in self.parts]
        self._order = endless_order(list(zip(weights, self.places(), strict=True)), seed)
        self.fingerprint = _fingerprint(self.prompts, seed, parts)

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self.prompts)

    def places(self) -> list[range]:
        """Where the prompts of each source stand in `prompts`."""
        ends = list(itertools.accumulate(size for _, size in self.parts))
        return [range(end - size, end) for end, (_, size) in zip(ends, self.parts, strict=True)]

    def prompt_at(self, cursor: int) -> Prompt:
        """Prompt number `cursor` (from 0) of the endless order."""
        return self.prompts[self._order[cursor]]  # pyright: ignore[reportArgumentType, reportCallIssue]

    def check_run(self, path: pathlib.Path, *, is_resumed: bool) -> None:
        """Note the fingerprint of the data in a new run's folder; refuse to resume a run with other data.

        Raises:
          MagistralError: The run at `path` was started with other problems, prompts or seed.
        """
        if not (is_resumed and path.exists()):
            path.write_text(json.dumps({"fingerprint": self.fingerprint, "num_prompts": len(self)}) + "\n")
            return
        saved = json.loads(path.read_text())["fingerprint"]
        if saved != self.fingerprint:
            raise MagistralError(
                f"{path}: the run was started with other data (fingerprint {saved[:12]}) than the problems and seed "
                f"given now ({self.fingerprint[:12]}); resume with the same ones"
            )


def endless_order(parts: Sequence[tuple[float, Sequence[int]]], seed: int) -> grain.MapDataset:
    """Endless order of numbers, a function of the seed: each part shuffled for itself and anew in every epoch.

    Args:
      parts: Weight and numbers of each part; every stretch of the order has the parts in these shares.
      seed: Taken modulo 2³².
    """
    orders = [
        grain.MapDataset.source(numbers).seed((seed % 2**32 + part) % 2**32).shuffle().repeat()
        for part, (_, numbers) in enumerate(parts)
    ]
    return grain.MapDataset.mix(orders, [weight for weight, _ in parts]) if len(orders) > 1 else orders[0]


def make_prompts(
    problems: Sequence[Problem],
    build: Callable[[Problem], Prompt],
    *,
    max_prompt_tokens: int,
    overlong: Literal["error", "drop"],
) -> tuple[list[Prompt], int]:
    """Prompts of all problems, and how many were dropped for their length.

    Args:
      problems: What to ask.
      build: `chat.build_prompt` with everything else filled in.
      max_prompt_tokens: Longest prompt that the engine takes.
      overlong: Raise at the first longer one, or leave it out and count it.
    """
    prompts: list[Prompt] = []
    for problem in problems:
        prompt = build(problem)
        if len(prompt.token_ids) <= max_prompt_tokens:
            prompts.append(prompt)
        elif overlong == "error":
            raise MagistralError(
                f"problem {problem.id}: its prompt has {len(prompt.token_ids)} tokens, the limit is "
                f"{max_prompt_tokens} (generation.max_prompt_tokens); raise it, or set data.overlong_prompts to drop"
            )
    return prompts, len(problems) - len(prompts)


def _fingerprint(prompts: Sequence[Prompt], seed: int, parts: Sequence[tuple[float, int]]) -> str:
    """SHA-256 over the seed, the parts, and every problem's id and statement, each with its length."""
    digest = hashlib.sha256(str(seed).encode() + (repr([*parts]).encode() if parts else b""))
    for prompt in prompts:
        for text in (prompt.problem.id, prompt.problem.statement):
            data = text.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
