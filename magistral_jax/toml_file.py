"""TOML files as tables."""

import pathlib
import tomllib
from typing import Any

from magistral_jax.records import MagistralError


def read_toml(path: pathlib.Path, what: str) -> dict[str, Any]:
    """The table of a TOML file.

    Args:
      path: Of the file.
      what: It holds, for the sentence: `cannot read the …`.

    Raises:
      MagistralError: There is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MagistralError(f"{path}: cannot read the {what}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MagistralError(f"{path}: not valid TOML: {error}.") from error
