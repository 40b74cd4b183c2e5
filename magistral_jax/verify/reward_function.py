"""A user's own correctness function: found by its import path, called with what it asks for, held to its word.

    def score(completion: str, answer: str, thoughts: str, difficulty: int) -> float: ...

It is called with keywords: `completion` (all that the policy wrote), `statement` and `answer` of the problem,
`thoughts` (what stands between the tags), and every other column of the problem's row under its own name. A function
that takes `**columns` gets all of them, any other those that it names. It returns the share of the correctness reward,
from 0 to 1; 1 is the verdict `correct`.

Its module is imported once, freely. The function itself runs in a worker that is confined like the math grader, since
completions are untrusted: it reads files below the import path and the current directory, writes none, and starts no
process and no connection. An exception, a hang and a score that is none are reported as `SANDBOX_ERROR`.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from magistral_jax.records import MagistralError
from magistral_jax.verify.item import VerifyItem
from magistral_jax.verify.reward import Submission

RewardFunction = Callable[..., Any]


def load_function(path: str) -> RewardFunction:
    """Import `package.module:name`.

    Raises:
      MagistralError: The path has another form, its module cannot be imported, or holds no such function.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise MagistralError(f"`reward.function` is `{path}`; expected `package.module:name`.")
    try:
        function: Any = importlib.import_module(module_name)
        for attribute in name.split("."):
            function = getattr(function, attribute)
    except Exception as error:
        raise MagistralError(
            f"`reward.function` is `{path}`, which cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if not callable(function):
        raise MagistralError(f"`reward.function` is `{path}`, which is no function but {type(function).__name__}.")
    return function


def call_function(function: RewardFunction, item: VerifyItem, submission: Submission) -> float:
    """The function's score of a completion.

    Raises:
      TypeError: The score is no number.
      ValueError: It is none from 0 to 1.
      Exception: Whatever the function raises.
    """
    arguments = {
        **item.problem.extra,
        "completion": item.completion,
        "statement": item.problem.statement,
        "answer": item.problem.answer,
        "thoughts": submission.sections.thoughts,
    }
    score = function(**_wanted(function, arguments))
    if isinstance(score, str):
        raise TypeError(f"the score is the text {score!r}; expected a number from 0 to 1")
    score = float(score)
    if not 0.0 <= score <= 1.0:  # NaN neither
        raise ValueError(f"the score is {score}; expected a number from 0 to 1")
    return score


def _wanted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
