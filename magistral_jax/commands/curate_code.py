"""Curation of code problems: known solutions on known tests, in the sandbox."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from magistral_jax.commands.curate import load_raw, start_folder, write_results
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.setup import say
from magistral_jax.config import Config
from magistral_jax.curate.code_problems import CodeProblem, read_problem
from magistral_jax.curate.code_runs import Execute, SolutionRuns
from magistral_jax.curate.code_steps import Judged, for_languages, judge, removal
from magistral_jax.curate.journal import in_chunks
from magistral_jax.curate.ledger import Step, split_step
from magistral_jax.data.overlap import Removal
from magistral_jax.verify.sandbox.mechanism import choose_mechanism


def curate_code(config: Config, folder: pathlib.Path) -> None:
    """Curate `data.train` into `folder`.

    Source: Magistral (arXiv:2506.10910), section 4.2.
    """
    raw = load_raw(config, kind="code")
    read = [read_problem(problem, config.code, config.curate.max_solutions) for problem in raw.problems]
    problems = [item for item in read if isinstance(item, CodeProblem)]
    unread = tuple(item for item in read if isinstance(item, Removal))
    steps = [*raw.steps, Step("solutions and tests", len(read), len(problems), unread)]
    mechanism = choose_mechanism(config.sandbox.mechanism)
    start_folder(config, folder)

    with progress_bar("running") as report, SolutionRuns(mechanism, config.code, config.verifiers.num_workers) as runs:
        records = in_chunks(
            problems,
            judge_in(runs, config),
            journal=folder / "judged.jsonl",
            key=lambda problem: problem.problem.id,
            chunk=config.curate.chunk,
            on_progress=report,
        )
    judged = [_judged(**record) for record in records]
    results = [removal(found) or problem.problem for problem, found in zip(problems, judged, strict=True)]
    kept, step = split_step("solutions on tests", results)
    by_id = {found.id: found for found in judged}
    doubled = [version for problem in kept for version in for_languages(problem, by_id[problem.id])]
    write_results(folder, doubled, doubled, [*steps, step, Step("languages", len(kept), len(doubled), ())])
    _say_counts(judged)


def _judged(tests: list[dict[str, str]], solutions: list[dict[str, str]], **fields: Any) -> Judged:
    """From a line of the journal."""
    return Judged(tests=tuple(tests), solutions=tuple(solutions), **fields)


def judge_in(runs: SolutionRuns, config: Config) -> Callable[[int, Sequence[CodeProblem]], list[dict[str, Any]]]:
    """A function that judges some problems, several at a time."""

    def decide(problem: CodeProblem, executor: Callable[[CodeProblem], Execute]) -> dict[str, Any]:
        return dataclasses.asdict(judge(problem, executor(problem), config.curate, config.run.seed))

    return lambda start, problems: runs.map(decide, problems)


def _say_counts(judged: Sequence[Judged]) -> None:
    total = collections.Counter[str]()
    for found in judged:
        total.update(found.counts)
    say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in total.items()))
