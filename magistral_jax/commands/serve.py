"""`magistral-jax serve`: a model folder as an OpenAI-compatible HTTP service."""

import dataclasses
import ipaddress
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import load_model, make_batcher, place_engine, say, say_warnings, think_tags
from magistral_jax.config import Config
from magistral_jax.data.tokenizer import Tokenizer
from magistral_jax.generate.batching import ContinuousBatcher
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_config import read_model_config
from magistral_jax.policy.hf_folder import load_params
from magistral_jax.publish.same_process import make_publish
from magistral_jax.records import MagistralError

try:
    from magistral_jax.serve.admin import Admin
    from magistral_jax.serve.app import make_app
    from magistral_jax.serve.async_engine import AsyncEngine
    from magistral_jax.serve.meters import Meters
    from magistral_jax.serve.orders import Limits
    from magistral_jax.serve.routes import Service
    from magistral_jax.serve.scoring import PromptScorer
    from magistral_jax.serve.server import Server, address_of, bind
except ModuleNotFoundError as error:
    raise MagistralError(
        f"`serve` needs the package {error.name}; install it with: pip install 'magistral-jax[serve]'."
    ) from None

Publish = Callable[[Any], dict[str, Any]]


def serve(config: Config) -> None:
    """Serve `policy.path` until Ctrl-C, which lets running requests end."""
    longest = config.generation.max_prompt_tokens + config.generation.max_new_tokens
    rows = dataclasses.replace(config.batch, row_tokens=max(config.batch.row_tokens, longest))
    say_warnings(dataclasses.replace(config, batch=rows))  # the rows of a trainer bound nothing here
    bound = bind(config.serve.host, config.serve.port)  # a port that is taken is found before a model is loaded
    with bound:
        server = make_server(config, bound)
        server.run(sockets=[bound])
    if server.failure is not None:
        raise server.failure


def make_server(config: Config, bound: socket.socket) -> Server:
    """The service of a configuration, its engine compiled; `run` listens on `bound`."""
    token = _read_token(config.serve.admin_token_file)
    model, tokenizer, batcher, publish = _load(config)
    scorer = PromptScorer(model, config.generation, batcher.reader)
    _warm_up(config, batcher, scorer)

    name = config.serve.model_name or pathlib.Path(config.policy.path).resolve().name
    engine = AsyncEngine(batcher, scorer, num_slots=config.generation.num_slots, max_pending=config.serve.max_pending)
    service = Service(
        engine,
        tokenizer,
        name,
        Limits(
            max_prompt_tokens=config.generation.max_prompt_tokens,
            max_new_tokens=config.generation.max_new_tokens,
            max_choices=config.serve.max_choices,
            max_body_bytes=config.serve.max_body_mib * 2**20,
            vocab_size=model.vocab_size,
            max_top_logprobs=config.serve.max_top_logprobs,
        ),
        think_tags(config),
        Meters(lambda: engine.stats),
    )
    admin = Admin(engine, token, lambda path: _load_weights(path, model, publish))
    ready = (
        f"serving {name} at {address_of(bound)}/v1: {config.generation.num_slots} slots, "
        f"{batcher.allocator.num_pages} pages of {config.generation.page_size} tokens; Ctrl-C ends"
    )
    return Server(
        make_app(service, admin),
        engine,
        drain_seconds=config.serve.drain_seconds,
        max_connections=config.serve.max_connections,
        request_seconds=config.serve.request_seconds,
        say=say,
        ready=ready,
    )


def _load(config: Config) -> tuple[ModelConfig, Tokenizer, ContinuousBatcher, Publish]:
    """The engine with its first weights; the copy in the trainer's layout is gone on return."""
    model = load_model(config)
    publish = make_publish(model.config, jnp.dtype(config.policy.dtype), None, *place_engine(config, model))
    # One alternative needs no search: what is sampled knows its own log-prob.
    num_top = config.serve.max_top_logprobs if config.serve.max_top_logprobs > 1 else 0
    batcher = make_batcher(config, model, num_top=num_top)
    batcher.set_weights(publish(model.params), 0)
    batcher.swap_weights()
    if not _is_loopback(config.serve.host):
        say(f"warning: `serve.host` is {config.serve.host}: whoever reaches that address may sample, without a token.")
    return model.config, model.tokenizer, batcher, publish


def _warm_up(config: Config, batcher: ContinuousBatcher, scorer: PromptScorer) -> None:
    if not config.serve.warm_up:
        return
    began = time.monotonic()
    with progress_bar("compiling") as report:
        batcher.warm_up(report)
        scorer.warm_up(batcher.params)
    shapes: dict[str, list[str]] = {}
    for what, rows, width in [*batcher.shapes(), *scorer.shapes()]:
        shapes.setdefault(what, []).append(f"{rows}×{width}")
    listed = "; ".join(f"{what} {', '.join(sizes)}" for what, sizes in shapes.items())
    say(f"compiled in {time.monotonic() - began:.0f} s (rows × tokens): {listed}")


def _load_weights(path: pathlib.Path, model: ModelConfig, publish: Publish) -> Any:
    """Weights of a folder with the served architecture, in the layout of the engine."""
    if read_model_config(path) != model:
        raise MagistralError(f"{path}: config.json describes another architecture than the model that is served.")
    return publish(load_params(path, model))


def _read_token(path: str) -> str:
    if not path:
        return ""
    try:
        token = pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MagistralError(f"`serve.admin_token_file`: cannot read {path}: {error}.") from None
    if not token:
        raise MagistralError(f"`serve.admin_token_file`: {path} is empty; expected a token.")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
