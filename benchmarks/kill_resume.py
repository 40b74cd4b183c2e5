"""A run that is killed again and again, and resumed each time: does it end where its own log says it must?

    python benchmarks/kill_resume.py FOLDER --kills 30 -- configs/quickstart.toml --schedule.num_steps=40 …

The trainer gets SIGKILL at moments that are drawn: at any time since its start, while a checkpoint is written, right
after a step (its publish and the verification of the next completions are under way then), while rollouts are written,
and while the end of the run is saved. After the last kill the run goes on to its end. Then
  - the whole log is replayed and compared: completions, rewards, batches, metrics and parameters of every step;
  - every prompt that was dispatched must be trained once, filtered once, or still on its way at the end;
  - every step must stand once in metrics and rollouts, with whole groups.
The last line is one JSON object; the exit code is 1 where anything is wrong.
"""

import argparse
import collections
import json
import math
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from magistral_jax.commands.session import make_rules
from magistral_jax.config import config_from_json
from magistral_jax.metrics import METRICS_FILE, ROLLOUTS_FILE, read_json_lines
from magistral_jax.schedule import machine
from magistral_jax.schedule.event_log import LOG_FILE, Session, Trained, read_log, to_event
from magistral_jax.schedule.replay import split_sessions
from magistral_jax.schedule.state import State

MAIN = [sys.executable, "-c", "from magistral_jax.main import main; main()"]
POLL_SECONDS = 0.002


def size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Moments:
    """Kinds of moments; each makes a function that says whether the moment has come."""

    def __init__(self, folder: pathlib.Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.usual_seconds = 10.0  # of a start; follows what is seen

    def any_time(self) -> Callable[[], bool]:
        end = time.monotonic() + self.chance.uniform(0, 1.5 * self.usual_seconds)
        return lambda: time.monotonic() >= end

    def checkpoint(self) -> Callable[[], bool]:
        return lambda: any((self.folder / "checkpoints").glob("*tmp*"))

    def after_a_step(self) -> Callable[[], bool]:
        return self._after_growth(METRICS_FILE, 0.1)

    def rollouts(self) -> Callable[[], bool]:
        return self._after_growth(ROLLOUTS_FILE, 0.0)

    def log(self) -> Callable[[], bool]:
        return self._after_growth(LOG_FILE, 0.3)

    def end(self) -> Callable[[], bool]:
        return lambda: (self.folder / "evaluation_after.json").exists() or (self.folder / "policy").exists()

    def draw(self) -> tuple[str, Callable[[], bool]]:
        kinds = [self.any_time, self.any_time, self.checkpoint, self.after_a_step, self.rollouts, self.log]
        kind = self.chance.choice(kinds)
        return kind.__name__, kind()

    def _after_growth(self, name: str, longest: float) -> Callable[[], bool]:
        """Some while after a file has grown a few times, so that the run comes forward from kill to kill."""
        path, delay = self.folder / name, self.chance.uniform(0, longest)
        num_missing, last, end = self.chance.randint(1, 8), size(path), math.inf

        def has_come() -> bool:
            nonlocal num_missing, last, end
            now = size(path)
            num_missing, last = num_missing - (now > last), now
            if num_missing == 0 and end == math.inf:
                end = time.monotonic() + delay
            return time.monotonic() >= end

        return has_come


def start(command: list[str], folder: pathlib.Path) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if (folder / "config.json").exists() else []
    with (folder.parent / f"{folder.name}.output").open("ab") as output:
        return subprocess.Popen([*command, *resume], stdout=output, stderr=output)


def run_with_kills(command: list[str], folder: pathlib.Path, num_kills: int, seed: int) -> collections.Counter[str]:
    """Start, kill, resume; returns how often each kind of moment was met."""
    moments, kills = Moments(folder, random.Random(seed)), collections.Counter[str]()
    while sum(kills.values()) < num_kills:
        is_last = sum(kills.values()) == num_kills - 1
        name, has_come = ("end", moments.end()) if is_last else moments.draw()
        began = time.monotonic()
        process = start(command, folder)
        while not has_come() and process.poll() is None:
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills[name] += 1
            moments.usual_seconds = 0.7 * moments.usual_seconds + 0.3 * (time.monotonic() - began)
            steps = list(read_json_lines(folder / METRICS_FILE))
            sys.stderr.write(f"kill {sum(kills.values())}: {name}, {len(steps)} steps\n")
        elif process.returncode != 0:
            raise SystemExit(f"the run failed by itself; see {folder}.output")
        else:
            break  # it has come to its end before all kills
    code = start(command, folder).wait()
    if code != 0:
        raise SystemExit(f"the last resume failed; see {folder}.output")
    return kills


def check_books(folder: pathlib.Path) -> dict[str, int]:
    """Every prompt in one place, every step once; the log alone says so."""
    records = [record for _, record in read_log(folder / LOG_FILE)]
    state, ended = State(), collections.Counter[int]()
    num_trained = 0
    sessions = list(split_sessions(records))
    rules = make_rules(config_from_json(sessions[0][0].config))  # what a resume may change is no rule of these
    for session, own in sessions:
        assert session.step == state.num_done
        for record in own:
            if isinstance(record, Trained):
                num_trained += 1
                assert (record.step, tuple(record.group_ids)) == (num_trained, state.training)
                ended.update(record.group_ids)
            if (event := to_event(record)) is not None:
                state, actions = machine.step(rules, state, event)
                ended.update(action.group_id for action in actions if isinstance(action, machine.Discard))
    assert set(ended.values()) == {1}
    assert {*ended} | {*state.outstanding()} == set(range(state.next_group))
    assert not {*ended} & {*state.outstanding()}

    steps = [line["step"] for line in read_json_lines(folder / METRICS_FILE)]
    assert steps == list(range(1, num_trained + 1))
    lines = list(read_json_lines(folder / ROLLOUTS_FILE))
    requests = [line["request"] for line in lines]
    assert len(requests) == len(set(requests))
    expected = [
        group_id * rules.group_size + member
        for record in records
        if isinstance(record, Trained)
        for group_id in record.group_ids
        for member in range(rules.group_size)
    ]
    assert requests == expected
    num_sessions = sum(isinstance(record, Session) for record in records)
    return {"sessions_in_log": num_sessions, "steps": num_trained, "groups_ended": len(ended)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of the run; must not exist")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("train", nargs="+", help="words of `magistral-jax train`, after --")
    args = parser.parse_args()
    began = time.monotonic()
    command = [*MAIN, "train", *args.train, f"--run.folder={args.folder}"]
    kills = run_with_kills(command, args.folder, args.kills, args.seed)
    books = check_books(args.folder)
    replay = subprocess.run([*MAIN, "replay", str(args.folder), "--check"], capture_output=True, text=True, check=False)
    verdict = replay.stderr.strip().splitlines()[-2:]
    result = {
        "kills": sum(kills.values()),
        "at": dict(kills),
        **books,
        "replay": verdict,
        "is_equal": replay.returncode == 0,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result))
    sys.exit(replay.returncode)


if __name__ == "__main__":
    main()
