"""`magistral-jax replay`: a run done again from its event log, configuration, seed and data, and compared with it."""

import argparse
import functools
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.commands.progress import progress_bar
from magistral_jax.commands.recorded import Grader, RecordedRun
from magistral_jax.commands.setup import save_policy, say
from magistral_jax.metrics import METRICS_FILE, ROLLOUTS_FILE, graded_of, read_json_lines
from magistral_jax.pytrees import TrainState
from magistral_jax.records import Graded, MagistralError
from magistral_jax.schedule.event_log import LOG_FILE, Trained, read_log, to_line
from magistral_jax.schedule.holdings import Holdings
from magistral_jax.schedule.loop import identify
from magistral_jax.schedule.replay import Difference, Replay, up_to_step


class _DiffersError(Exception):
    """There is a difference, and what comes after it would only follow from it."""


def replay(words: Sequence[str]) -> None:
    """The command; `words` are those behind its name. Ends with code 1 where `--check` or `--step` finds a difference.

    Raises:
      MagistralError: The folder holds no run, or what the run was made from is not what it was.
    """
    args = _parse(words)
    log = args.run / LOG_FILE
    if args.show:
        for seconds, record in read_log(log):
            sys.stdout.write(to_line(seconds, record) + "\n")
        return
    records = [record for _, record in read_log(log)]
    run = RecordedRun(args.run, records if args.until is None else up_to_step(records, args.until))
    is_checked = args.check or args.step is not None
    if args.step is None:
        differences, what = replay_run(run, is_checked=is_checked, out=args.out)
    else:
        differences, what = rebuild_step(run, args.step)
    if is_checked:
        say(f"{len(differences)} differences in {what}")
    for difference in differences[:1]:
        say(f"the first: {difference}")
    if differences and is_checked:
        sys.exit(1)


def replay_run(run: RecordedRun, *, is_checked: bool, out: pathlib.Path | None) -> tuple[list[Difference], str]:
    """Do everything again.

    Args:
      run: What was recorded.
      is_checked: Grade again as well, and end at the first difference from which others would follow.
      out: Where to write the policy that comes out; None is nowhere.

    Returns:
      What came out otherwise, and how much was looked at.
    """
    differences: list[Difference] = []

    def note(difference: Difference) -> None:
        differences.append(difference)
        if is_checked and not difference.is_reward:
            raise _DiffersError

    metrics = {line["step"]: line for line in read_json_lines(run.folder / METRICS_FILE)}
    with tempfile.TemporaryDirectory() as logs, Grader(run.config) as grade, progress_bar("replay") as report:
        again = Replay(
            run.records,
            functools.partial(run.stages_of, logs=pathlib.Path(logs)),
            Holdings(run.config.batch.group_size, run.assign, run.decode),
            run.curriculum,
            grade=grade if is_checked else None,
            metrics=metrics,
            on_difference=note,
        )
        try:
            for done in again.run():
                report(done, len(run.records))
        except _DiffersError:
            pass
    params = again.train_state.params
    say(f"parameters after step {again.schedule.num_done}: {identify(params, again.weights):#010x}")
    if out is not None:
        save_policy(out, run.model, params, run.config.policy.path)
    return differences, f"{again.num_completions} completions, {again.num_steps} steps"


def rebuild_step(run: RecordedRun, step: int) -> tuple[list[Difference], str]:
    """Do one train step again, from its recorded rollouts and the nearest checkpoint before it.

    Returns:
      What came out otherwise, and from where it was rebuilt.

    Raises:
      MagistralError: The run has no such step, or its rollouts are not whole.
    """
    trained = {record.step: record for record in run.records if isinstance(record, Trained)}
    if step not in trained:
        raise MagistralError(f"--step: {run.folder} has the steps 1 to {max(trained, default=0)}, not {step}.")
    first, state = _state_before(run, step)
    origin = f"the checkpoint of step {first}" if first else "the start"
    for number in range(first + 1, step + 1):
        groups = _recorded_groups(run, trained[number])
        stages = run.stages_of(run.session_of_step(number), logs=run.folder)
        state, _, _ = stages.update(state, groups, number - 1, run.stage_of_step.get(number, 0))
        now = identify(state.params, stages.publish(state.params))
        if now != trained[number].fingerprint:
            where = f"step {number}"
            return [Difference("fingerprint of the parameters", where, trained[number].fingerprint, now)], where
    return [], f"step {step}, rebuilt from {origin} and {step - first} steps' rollouts"


def _state_before(run: RecordedRun, step: int) -> tuple[int, TrainState]:
    """The latest state that is saved, or given, before a step."""
    initial = run.stages_of(run.session_of_step(step), logs=run.folder).initial_state
    with Checkpoints(run.folder / "checkpoints", is_reader=True) as checkpoints:
        saved = [number for number in checkpoints.steps() if number < step]
        return (saved[-1], checkpoints.restore(initial, saved[-1]).state) if saved else (0, initial)


def _recorded_groups(run: RecordedRun, trained: Trained) -> list[list[Graded]]:
    """The batch of a step as `rollouts.jsonl` has it."""
    size = run.config.batch.group_size
    graded = [
        graded_of(line, run.assign(line["request"] // size).prompt.token_ids)
        for line in read_json_lines(run.folder / ROLLOUTS_FILE)
        if line["step"] == trained.step
    ]
    expected = [group_id * size + member for group_id in trained.group_ids for member in range(size)]
    if [member.rollout.request_id for member in graded] != expected:
        raise MagistralError(f"{run.folder / ROLLOUTS_FILE}: the rollouts of step {trained.step} are not whole.")
    return [graded[start : start + size] for start in range(0, len(graded), size)]


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="magistral-jax replay", description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="folder of a run of `magistral-jax train`")
    parser.add_argument("--until", type=int, metavar="STEP", help="end with this step")
    parser.add_argument(
        "--check",
        action="store_true",
        help="grade again, and compare tokens, log-probs, versions, rewards, batches, metrics and parameters; ends at "
        "the first difference with exit code 1",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="rebuild and compare this train step only, from its recorded rollouts"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="write the policy that comes out")
    parser.add_argument("--show", action="store_true", help="print the event log as JSON lines, and do nothing else")
    return parser.parse_args(words)
