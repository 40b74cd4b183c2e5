"""`magistral-jax smollm2`: SmolLM2-135M-Instruct, out of the [smollm2] extra, as a model folder at `policy.path`."""

from magistral_jax.commands.setup import say
from magistral_jax.config import Config
from magistral_jax.policy.smollm2 import convert
from magistral_jax.records import MagistralError


def smollm2(config: Config) -> None:
    """Convert the packaged GGUF file."""
    if not config.policy.path:
        raise MagistralError(
            "`policy.path` is empty; expected the folder to write, such as --policy.path=models/smollm2."
        )
    convert(config.policy.path)
    say(f"model folder: {config.policy.path}")
