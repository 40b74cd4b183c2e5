"""The command line: reads the words and calls a command. `--help` imports no jax."""

import errno
import importlib
import sys
from collections.abc import Callable, Sequence

import magistral_jax
from magistral_jax.config import Config, load
from magistral_jax.records import MagistralError

_COMMANDS = {
    "train": "reinforcement learning: evaluate, train, evaluate, report",
    "sft": "supervised fine-tuning on traces (cold start)",
    "evaluate": "pass@1, pass@k and maj@k of a model folder on held-out problems",
    "generate": "sample completions of the evaluation problems and print them",
    "smollm2": "convert the packaged SmolLM2-135M-Instruct to a model folder",
    "export": "write the policy of a run as a Hugging Face folder",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 the user's mistake (one sentence on standard error), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return
    if words[0] == "--version":
        sys.stdout.write(f"magistral-jax {magistral_jax.__version__}\n")
        return
    try:
        if words[0] not in _COMMANDS:
            raise MagistralError(f"unknown command `{words[0]}`; expected one of {', '.join(_COMMANDS)}")
        config = load(words[1:], prog=f"magistral-jax {words[0]}")
        _command(words[0])(config)
    except MagistralError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output (`| head`) has seen enough
        sys.stdout = None
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(f"error: the disk is full ({error}); free some space and go on with --resume.\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _command(name: str) -> Callable[[Config], None]:
    # Imported only now: jax alone takes longer than `--help` may.
    return getattr(importlib.import_module(f"magistral_jax.commands.{name}"), name)


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name.ljust(width)}  {purpose}" for name, purpose in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: magistral-jax COMMAND [CONFIG.toml] [--section.key=value ...]",
            "",
            *lines,
            "",
            "`magistral-jax COMMAND --help` lists every setting.",
            "",
        ]
    )
