"""What the math grader saw and did, step by step, for people and as JSON.

The steps are those of the grading itself, taken anew; nothing here decides anything.
"""

from typing import Any

from magistral_jax.verify.math_answer import Step, grading_steps
from magistral_jax.verify.math_readings import Reading
from magistral_jax.verify.math_show import show
from magistral_jax.verify.math_tree import Tree
from magistral_jax.verify.math_units import Unit


def explain_math(answer: str, reference: str, *, is_ordered: bool | None = None) -> dict[str, Any]:
    """How an answer is graded.

    Args:
      answer: What was extracted from the completion.
      reference: The known answer.
      is_ordered: As for `grade_math`.

    Returns:
      JSON values: `extracted`, `reference`, `verdict`, `path`, and `steps`, each with its name under `step`: the
      normalised texts, the size checks, the readings of both sides by each grammar as expression trees, and every
      comparison of two readings with its result.
    """
    steps = grading_steps(answer, reference, is_ordered=is_ordered)
    verdict = steps[-1].verdict
    assert verdict is not None
    return {
        "extracted": answer,
        "reference": reference,
        "steps": [_fields(step) for step in steps],
        "verdict": verdict.value,
        "path": steps[-1].path,
    }


def _fields(step: Step) -> dict[str, Any]:
    fields = {"step": step.name, **{name: _plain(value) for name, value in step.found.items()}}
    if step.verdict is not None:
        fields |= {"verdict": step.verdict.value, "path": step.path}
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Reading):
        unit = {} if value.unit is None else {"unit": _unit(value.unit)}
        return {"text": value.spelling, "grammar": value.grammar, "tree": show(value.tree), **unit}
    return show(value) if isinstance(value, Tree) else value


def _unit(unit: Unit) -> str:
    """`1/100 length^2`."""
    return " ".join([str(unit.factor), *(f"{name}^{power}" for name, power in unit.dimensions)])
