"""The command line: reads the words and calls a command. `--help` imports no jax."""

import errno
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import magistral_jax
from magistral_jax.config import load
from magistral_jax.records import MagistralError

_COMMANDS = {
    "train": "reinforcement learning: evaluate, train, evaluate, report",
    "sft": "supervised fine-tuning on traces (cold start)",
    "evaluate": "pass@1, pass@k and maj@k of a model folder on held-out problems",
    "generate": "sample completions of the evaluation problems and print them",
    "serve": "answer OpenAI's clients over HTTP from a model folder",
    "traces": "right completions of a teacher, to fine-tune on",
    "tokenizer": "a small tokenizer of your own, for a policy from random weights",
    "smollm2": "convert the packaged SmolLM2-135M-Instruct to a model folder",
    "export": "write the policy of a run as a Hugging Face folder",
}
_TOOLS = {
    "verify": "grade a JSONL file of completions, or explain the verdict on one row",
    "sandbox": "check the sandbox, or run one program in it",
    "simulate": "run the schedule against a cost model: speed, staleness, the best split of devices",
    "curate": "choose training problems: format, difficulty, wrong references, tests of programs",
    "translate": "a share of the English problems into other languages, by a chat endpoint",
    "replay": "do a recorded run again and compare: tokens, rewards, batches, parameters",
    "generator": "sample for a trainer on another host",
    "recipe": "traces, fine-tuning and reinforcement learning in a row, over variants and seeds",
    "plan": "what a run would take of each device, from shapes alone",
}
"""Commands with words of their own in the place of a configuration."""


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
        if words[0] in _TOOLS:
            _command(words[0])(words[1:])
        elif words[0] in _COMMANDS:
            config = load(words[1:], prog=f"magistral-jax {words[0]}")
            _command(words[0])(config)
        else:
            known = ", ".join([*_COMMANDS, *_TOOLS])
            raise MagistralError(f"unknown command `{words[0]}`; expected one of {known}")
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


def _command(name: str) -> Callable[[Any], None]:
    # Imported only now: jax alone takes longer than `--help` may.
    return getattr(importlib.import_module(f"magistral_jax.commands.{name}"), name)


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines, tools = (
        [f"  {name.ljust(width)}  {purpose}" for name, purpose in commands.items()] for commands in (_COMMANDS, _TOOLS)
    )
    return "\n".join(
        [
            "usage: magistral-jax COMMAND [CONFIG.toml] [--section.key=value ...]",
            "",
            *lines,
            "",
            "usage: magistral-jax TOOL --help",
            "",
            *tools,
            "",
            "`magistral-jax COMMAND --help` lists every setting.",
            "",
        ]
    )
