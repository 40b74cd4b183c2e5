"""What several commands need: the model folder, prompts, the engine, the run folder."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from magistral_jax.checks import check
from magistral_jax.config import Config, config_from_json, dump
from magistral_jax.data.chat import build_prompt
from magistral_jax.data.loader import PromptLoader, make_prompts
from magistral_jax.data.sources import load_problems
from magistral_jax.data.tokenizer import Tokenizer, load_tokenizer
from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.fleet import make_fleet
from magistral_jax.generate.handle import Generator, Reports
from magistral_jax.generate.messages import EngineSettings
from magistral_jax.generate.remote_fleet import make_remote_fleet
from magistral_jax.generate.service import GeneratorThread
from magistral_jax.metrics import replace_text
from magistral_jax.policy.attention import choose_attention
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_config import also_sees, read_model_config, read_text_config
from magistral_jax.policy.hf_folder import load_params, save_folder
from magistral_jax.policy.hf_stream import load_sharded
from magistral_jax.policy.native_attention import why_no_native_pages
from magistral_jax.policy.pages import PageReader
from magistral_jax.policy.sharding import check_mesh, generator_shardings, make_generator_mesh, param_shardings
from magistral_jax.policy.transformer import init_params
from magistral_jax.publish.planes import choose_plane
from magistral_jax.publish.same_process import make_publish
from magistral_jax.records import MagistralError, Problem, Prompt, Reward
from magistral_jax.verify.code_tests import select_tests
from magistral_jax.verify.pool import VerifierPool


def say(sentence: str) -> None:
    """One line to standard error, where progress goes."""
    sys.stderr.write(f"{sentence}\n")


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model folder."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    model_type: Any  # family named in config.json; read_model_config has checked it


def load_model(config: Config, mesh: Mesh | None = None) -> Model:
    """Architecture, parameters and tokenizer of `policy.path`.

    Args:
      config: Of the run.
      mesh: Where the parameters are to lie: each process reads what its own devices hold. None is the first device.

    Raises:
      MagistralError: No path, or a folder that is incomplete or does not fit together or onto the mesh.
    """
    if not config.policy.path:
        raise MagistralError("`policy.path` is empty; expected a model folder (config.json, safetensors, tokenizer).")
    folder = pathlib.Path(config.policy.path)
    model = read_model_config(folder)
    check_positions(config, model)
    tokenizer = load_tokenizer(folder, model.vocab_size)
    # What is trained is stored as the optimizer wants it; what stands still under adapters, as it is computed with.
    dtype = jnp.dtype(config.policy.dtype if config.policy.lora_rank else config.optimizer.param_dtype)
    draw = lambda: init_params(model, jax.random.key(config.run.seed))
    init = lambda: jax.tree.map(lambda leaf: leaf.astype(dtype), draw())
    if mesh is None and config.policy.random_init:
        params = init()
    elif mesh is None:
        params = jax.tree.map(jnp.asarray, load_params(folder, model, dtype))
    else:
        check_mesh(model, mesh)
        shardings = param_shardings(model, mesh, jax.eval_shape(init))
        random_init = config.policy.random_init
        load = lambda: load_sharded(folder, model, shardings, dtype)
        params = jax.jit(init, out_shardings=shardings)() if random_init else load()
    if also_sees(folder):
        say(f"warning: the vision tower of {folder} is left out: the text part alone is used, and is what is saved")
    return Model(model, params, tokenizer, read_text_config(folder)["model_type"])


def check_positions(config: Config, model: ModelConfig) -> None:
    """Refuse sequences for which the model of `policy.path` was not made.

    Raises:
      MagistralError: The longest one has more tokens than the model has positions.
    """
    longest = config.generation.max_prompt_tokens + config.generation.max_new_tokens
    if longest > model.max_positions:
        raise MagistralError(
            f"`generation.max_prompt_tokens` + `generation.max_new_tokens` ({longest}) exceed the "
            f"{model.max_positions} positions of the model in {config.policy.path}."
        )


def load_prompts(config: Config, tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[Prompt]:
    """Problems as the policy sees them; says how many were left out for their length.

    Raises:
      MagistralError: A prompt is too long and must not be dropped, or the tests of a code problem cannot be read.
    """
    for problem in problems:
        if problem.kind == "code" and not config.reward.function:
            select_tests(problem, config.code, seed=0)
    build = functools.partial(
        build_prompt,
        tokenizer=tokenizer,
        system_prompt=config.data.system_prompt,
        think_tags=think_tags(config),
    )
    prompts, num_dropped = make_prompts(
        problems,
        build,
        max_prompt_tokens=config.generation.max_prompt_tokens,
        overlong=config.data.overlong_prompts,
    )
    if num_dropped:
        say(f"{num_dropped} of {len(problems)} problems left out: longer than generation.max_prompt_tokens")
    return prompts


def load_evaluation_problems(config: Config) -> list[Problem]:
    """The held-out problems; the seed is not the run's, so that all runs are measured on the same ones."""
    if not config.data.evaluation:
        raise MagistralError("`data.evaluation` is empty; expected a problem file or reasoning-gym:NAME.")
    return load_problems(config.data.evaluation, config.data.num_evaluation, EVALUATION_SEED)


EVALUATION_SEED = 2**31 - 1


def think_tags(config: Config) -> tuple[str, str]:
    """Tags around the thoughts."""
    return config.reward.think_open, config.reward.think_close


def completion_text(model: Model, ids: np.ndarray) -> str:
    """Text of a completion without its stop token."""
    if len(ids) and int(ids[-1]) in model.tokenizer.stop_ids:
        ids = ids[:-1]
    return model.tokenizer.decode(ids)


def save_policy(target: pathlib.Path, model: Model, params: Any, source: str) -> None:
    """The policy as a Hugging Face folder, with the tokenizer files of the folder that it came from."""
    save_folder(target, params, model.config, model_type=model.model_type, tokenizer_from=source)


def make_batcher(config: Config, model: Model, trainer: Mesh | None = None, *, num_top: int = 0) -> ContinuousBatcher:
    """The engine, its page pool allocated; says how it reads pages, and where.

    Args:
      config: Of the run.
      model: To be sampled from.
      trainer: Devices that are the trainer's, where there is one.
      num_top: Most probable tokens that it reports in each place.
    """
    generation, (mesh, _) = config.generation, place_engine(config, model, trainer)
    stop_ids = tuple(model.tokenizer.stop_ids)
    batcher = ContinuousBatcher(model.config, generation, stop_ids, config.run.seed, mesh, num_top)
    say(describe_engine(generation, model.config, batcher.reader, trainer))
    return batcher


def make_sampler(config: Config, model: Model) -> ContinuousBatcher:
    """An engine that holds the weights of the model folder, as version 0: for commands that do not train."""
    batcher = make_batcher(config, model)
    publish = make_publish(model.config, jnp.dtype(config.policy.dtype), None, *place_engine(config, model))
    batcher.set_weights(publish(model.params), 0)
    return batcher


def place_engine(config: Config, model: Model, trainer: Mesh | None = None) -> tuple[Mesh | None, Any]:
    """The mesh of the engine and a sharding for each of its weights: what `make_publish` wants to know of it.

    The engine takes devices that the trainer leaves free, where there are enough of them. Both are None where it takes
    one device alone, the first.
    """
    num, num_taken = config.generation.tensor, 0 if trainer is None else len(trainer.local_devices)
    if num == 1 and not 0 < num_taken < jax.local_device_count():
        return None, None
    mesh = make_generator_mesh(num, num_taken=num_taken)
    return mesh, generator_shardings(model.config, mesh)


def describe_engine(
    generation: GenerationConfig, model: ModelConfig, reader: PageReader, trainer: Mesh | None = None
) -> str:
    """How an engine reads its pages, on which devices, and whether these are the trainer's as well."""
    devices = jax.local_devices()[:1] if reader.mesh is None else list(reader.mesh.devices.flat)
    is_shared = trainer is not None and not set(devices).isdisjoint(trainer.devices.flat)
    is_second_best = generation.attention == "auto" and reader.implementation == "xla" and devices[0].platform == "cpu"
    obstacle = why_no_native_pages("cpu", model.head_dim, generation.kv_dtype) if is_second_best else ""
    return (
        f"KV pages in {generation.kv_dtype} are read by `{reader.implementation}` (generation.attention = "
        f"{generation.attention}) on {', '.join(map(str, devices))}"
        + (", shared with the trainer" if is_shared else "")
        + (f"; `native` is not used, as {obstacle}" if obstacle else "")
    )


def describe_training_attention(config: Config, model: Model) -> str:
    """How the trainer computes attention; to be said once nothing is left that the user may have got wrong.

    Raises:
      MagistralError: The choice cannot work on this platform.
    """
    policy = config.policy
    chosen = choose_attention(policy.attention, model.config, dtype=policy.dtype, platform=jax.default_backend())
    return f"attention over rows is computed by `{chosen}` (policy.attention = {policy.attention})"


def make_generator(
    config: Config, model: Model, batcher: ContinuousBatcher, folder: pathlib.Path, reports: Reports
) -> Generator:
    """What samples the training rollouts: `batcher` in a thread, or processes with engines of their own."""
    generation, stop_ids = config.generation, tuple(model.tokenizer.stop_ids)
    if generation.where == "thread":
        return GeneratorThread(batcher, reports)
    settings = EngineSettings(model.config, generation, stop_ids, config.run.seed, config.policy.dtype)
    plane, deadline = choose_plane(generation.plane, generation.where), config.schedule.role_deadline
    say(f"weights go to the generators by {plane} (generation.plane = {generation.plane})")
    if generation.where == "process":
        return make_fleet(settings, reports, folder=folder, deadline=deadline)
    fleet = make_remote_fleet(settings, reports, deadline=deadline)
    token = f" --token-file {generation.token_file}" if generation.token_file else ""
    say(f"waiting for generators: magistral-jax generator {fleet.address}{token}")
    return fleet


def make_verifiers(config: Config, on_result: Callable[[int, Reward], None] | None = None) -> VerifierPool:
    """The verifier pool, its sandbox tested."""
    return VerifierPool(config.reward, config.verifiers, on_result, code=config.code, sandbox=config.sandbox)


def open_run(config: Config) -> pathlib.Path:
    """The run folder, if a run may begin there or, to resume, go on. Nothing is written yet.

    Raises:
      MagistralError: Settings that cannot work, a folder that holds a run already, or nothing to resume.
    """
    folder = pathlib.Path(config.run.folder)
    path = folder / "config.json"
    if config.run.resume:
        if not path.exists():
            raise MagistralError(f"{folder} holds no run to resume: config.json is missing.")
        saved = config_from_json(path.read_text(encoding="utf-8"), origin=str(path))
        _check_same(saved, config, path)
    elif path.exists():
        raise MagistralError(f"{folder} holds a run already; go on with it by --resume, or give another --folder.")
    say_warnings(config)
    return folder


def start_run(folder: pathlib.Path, config: Config, loader: PromptLoader) -> None:
    """Write the resolved config and the fingerprint of the data: from here on the folder holds a run.

    Comes after everything that the user may have got wrong, so that a mistake leaves nothing behind.

    Raises:
      MagistralError: The run that is to be resumed was started with other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loader.check_run(folder / "data.json", is_resumed=config.run.resume)
    replace_text(folder / "config.json", dump(config))


def say_warnings(config: Config) -> None:
    """Refuse settings that cannot work together; say which ones are unsound."""
    for warning in check(config):
        say(f"warning: {warning}")


def _check_same(saved: Config, given: Config, path: pathlib.Path) -> None:
    before, now = dataclasses.asdict(saved), dataclasses.asdict(given)
    changed = [
        f"{section}.{field}"
        for section, fields in now.items()
        for field, value in fields.items()
        if before[section][field] != value and not {section, f"{section}.{field}"} & _FREE_ON_RESUME
    ]
    if changed:
        raise MagistralError(f"{path}: the run was started with other settings of {', '.join(changed)}.")


# A resume may ask for a longer run, say less or more about it, and have its generators and devices elsewhere.
_FREE_ON_RESUME = {
    "run.resume",
    "run.folder",
    "run.keep_best",
    "run.best",
    "run.tensorboard",
    "run.wandb",
    "generation.where",
    "generation.tensor",
    "generation.num_generators",
    "generation.devices",
    "generation.max_restarts",
    "generation.plane",
    "generation.transfer_deadline",
    "generation.listen",
    "generation.token_file",
    "schedule.num_steps",
    "schedule.checkpoint_every",
    "curriculum.begin",
    "translate.endpoint",
    "translate.key_file",
    "translate.concurrency",
    "translate.timeout",
    "translate.retries",
    "serve",
    "mesh",
    "distributed",
}
