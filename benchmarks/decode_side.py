"""One side of the decoding benchmark, in a process of its own; started by `decode.py`, never by hand.

Reads orders from its input, a JSON object a line: `{"case": name}`; answers each on its output with the lengths of the
completions, wall seconds, and CPU seconds of all its threads. What libraries print goes to the standard error.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import decode_work
import numpy as np
from decode_work import Work

Run = Callable[[], list[np.ndarray]]  # decodes all requests, returns what each drew


def make(side: str, folder: pathlib.Path, work: Work, settings: dict[str, int]) -> Run:
    """What runs one case."""
    if side == "transformers":
        import transformers_peer

        return transformers_peer.make_generate(folder, work, settings["batch"])
    if side == "transformers-cb":
        import transformers_peer

        return transformers_peer.make_continuous(folder, work, settings["batch"])
    return (make_tunix if side == "tunix" else make_ours)(folder, work, settings)


def make_ours(folder: pathlib.Path, work: Work, settings: dict[str, int]) -> Run:
    """The engine, fed all requests at once; request ids go on, so that each run draws anew."""
    import jax.numpy as jnp

    from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
    from magistral_jax.generate.config import GenerationConfig
    from magistral_jax.policy.hf_folder import load_params
    from magistral_jax.publish.same_process import make_publish
    from magistral_jax.records import SamplingParams

    model = decode_work.read_model(folder)
    config = GenerationConfig(
        num_slots=settings["batch"],
        page_size=settings["page_size"],
        max_prompt_tokens=work.prompts.shape[1],
        max_new_tokens=work.longest,
        decode_block=settings["decode_block"],
        prefill_rows=settings["prefill_rows"],
    )
    batcher = ContinuousBatcher(model, config, work.stop_ids, seed=0)
    batcher.set_weights(make_publish(model, jnp.dtype("float32"))(load_params(folder, model)), 0)
    batcher.warm_up()
    round_ = 0

    def run() -> list[np.ndarray]:
        nonlocal round_
        first = round_ * len(work.prompts)
        round_ += 1
        for index, (prompt, limit) in enumerate(zip(work.prompts, work.limits.tolist(), strict=True)):
            sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=limit)
            batcher.submit(GenerationRequest(first + index, prompt, sampling))
        completions: dict[int, np.ndarray] = {}
        while batcher.num_running or batcher.num_waiting:
            completions |= {rollout.request_id: rollout.completion_ids for rollout in batcher.step()}
        return [completions[first + index] for index in range(len(work.prompts))]

    return run


def make_tunix(folder: pathlib.Path, work: Work, settings: dict[str, int]) -> Run:
    """Tunix's sampler, a batch after the other, each to the longest limit of its rows."""
    import jax
    import jax.numpy as jnp
    import tunix_peer

    from magistral_jax.policy.hf_folder import load_params

    model = decode_work.read_model(folder)
    params = jax.tree.map(jnp.asarray, load_params(folder, model))
    peer = tunix_peer.make_model(model, params)
    sampler = tunix_peer.make_sampler(peer, model, cache_size=work.prompts.shape[1] + work.longest)
    # Without stop ids Tunix would stop at its tokenizer's; an id beyond the vocabulary never comes.
    stops = work.stop_ids or (model.vocab_size,)

    def run() -> list[np.ndarray]:
        completions: list[np.ndarray] = []
        for start in range(0, len(work.prompts), settings["batch"]):
            rows = slice(start, start + settings["batch"])
            drawn = sampler(work.prompts[rows], int(work.limits[rows].max()), stops, seed=start)
            # The stop token that Tunix cuts off; behind a completion that met its limit it is not counted.
            completions += [np.append(tokens, stops[0]) for tokens in drawn]
        return completions

    return run


def main(side: str, folder: pathlib.Path, settings: dict[str, int]) -> None:
    """Answer orders until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runs: dict[str, tuple[Work, Run]] = {}
    for line in sys.stdin:
        case = json.loads(line)["case"]
        try:
            if case not in runs:
                work = decode_work.load(folder / f"{case}.npz")
                runs = {case: (work, make(side, folder, work, settings))}  # one case's memory at a time
            work, run = runs[case]
            wall, cpu = time.perf_counter(), time.process_time()
            completions = run()
            taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            answer = taken | {"lengths": work.lengths(completions)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))
