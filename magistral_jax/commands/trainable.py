"""What of a model a run trains, all of it or low-rank adapters, and the whole policy that comes of it."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magistral_jax.commands.setup import Model
from magistral_jax.config import Config
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.lora import init_adapters, merge
from magistral_jax.records import MagistralError

_BASE_FILE = "base.json"


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parameters that an optimizer changes, beside those that it does not."""

    start: Any
    """Trained parameters before the first update."""
    frozen: Any
    """Parameters under adapters, or None where everything is trained."""
    fingerprint: int | None
    """Of the frozen parameters."""
    whole: Callable[[Any], Any]
    """The parameters of the policy from trained ones, for publishing and export."""


def trainable(config: Config, model: Model, mesh: Mesh | None = None) -> Trainable:
    """All parameters of a model, or adapters beside them, whole on every device of the mesh."""
    if not config.policy.lora_rank:
        return Trainable(model.params, None, None, lambda params: params)
    start = init_adapters(model.params, config.policy, jax.random.key(config.run.seed))
    if mesh is not None:
        start = jax.device_put(start, NamedSharding(mesh, P()))
    merged = jax.jit(functools.partial(merge, policy=config.policy))
    return Trainable(start, model.params, fingerprint(model.params), lambda adapters: merged(model.params, adapters))


def check_base(folder: pathlib.Path, part: Trainable) -> None:
    """Note in a run's folder what its adapters stand beside, or refuse to go on beside something else.

    A checkpoint of adapters holds nothing else: their base is read from `policy.path` every time.

    Raises:
      MagistralError: The run was started with other weights in `policy.path`.
    """
    if part.fingerprint is None:
        return
    path = folder / _BASE_FILE
    if not path.exists():
        path.write_text(json.dumps({"fingerprint": part.fingerprint}) + "\n", encoding="utf-8")
        return
    expected = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    if expected != part.fingerprint:
        raise MagistralError(
            f"{path}: the run's adapters were trained beside weights with the fingerprint {expected:08x}; those in "
            f"`policy.path` now have {part.fingerprint:08x}."
        )
