"""The main job from the command line: what a run leaves behind, that it adds up, and that it goes on after a stop."""

import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from magistral_jax.checkpoint import Checkpoints
from magistral_jax.commands.setup import EVALUATION_SEED
from magistral_jax.config import config_from_json
from magistral_jax.data.sources import load_problems
from magistral_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from magistral_jax.metrics import read_json_lines
from magistral_jax.policy.hf_folder import load_params, read_model_config
from magistral_jax.records import Verdict
from magistral_jax.schedule.event_log import LOG_FILE, read_log, to_line
from magistral_jax.train.config import OptimizerConfig
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import init_state

STEPS, BATCH, GROUP = 3, 8, 4


def lines(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    return list(read_json_lines(folder / name))


def events(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The event log, without what only explains."""
    log = [json.loads(to_line(seconds, record)) for seconds, record in read_log(folder / LOG_FILE)]
    return [event for event in log if event["event"] not in ("Session", "Took", "Holds", "Noted")]


def summary(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def copy(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    shutil.copytree(folder, target)
    return target


def restored(folder: pathlib.Path, model: pathlib.Path) -> tuple[int, Any, dict[str, Any]]:
    """(step, train state, schedule) of the latest checkpoint."""
    params = load_params(model, read_model_config(model))
    state = init_state(jax.tree.map(np.asarray, params), make_optimizer(OptimizerConfig(), 1))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(state)


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_the_summary_has_the_keys_that_others_read(finished_run: pathlib.Path):
    found = summary(finished_run)
    named = {"eval_before", "eval_after", "steps", "wall_seconds", "mean_staleness", "swapped_token_share"} | {
        "generator_idle_share",
        "mean_completion_length_first",
        "mean_completion_length_last",
        "dropped",
    }
    assert found.keys() == named | {"generator_idle_unbounded_share", "dispatched", "trained"}
    for when in ("eval_before", "eval_after"):
        assert {"pass_at_1", "maj_at_8", "num_problems"} <= found[when].keys()
        assert found[when]["num_problems"] == 4
        assert found[when]["format_rate"] == 1.0  # the policy writes nothing else
        assert 0 <= found[when]["pass_at_1"] <= found[when]["pass_at_k"]["8"] <= 1
    assert found["steps"] == STEPS
    assert 0 < found["wall_seconds"] < 3600
    assert 0 <= found["generator_idle_unbounded_share"] <= found["generator_idle_share"] <= 1
    # <think> . </think> \boxed{5} <eos>: at least 14 tokens.
    assert 13 < found["mean_completion_length_first"] < 24
    assert 13 < found["mean_completion_length_last"] < 24


def test_every_dispatched_sequence_is_accounted_for(finished_run: pathlib.Path):
    found = summary(finished_run)
    assert found["trained"] == STEPS * BATCH
    assert found["dispatched"] == found["trained"] + sum(found["dropped"].values())
    assert found["dropped"].keys() <= {"zero_variance", "verifier_failed", "run_end"}
    assert all(count >= 0 and count % GROUP == 0 for count in found["dropped"].values())
    assert found["dropped"]["zero_variance"] > 0  # two sums in three have an answer that the policy never writes
    assert "verifier_failed" not in found["dropped"]


def test_every_event_happens_once_and_in_order(finished_run: pathlib.Path):
    log = events(finished_run)
    assert log[0]["event"] == "Started"
    assert sum(event["event"] == "Trained" for event in log) == STEPS
    assert (log[-1]["event"], log[-1]["step"]) == ("Trained", STEPS)
    generated = [event["request_id"] for event in log if event["event"] == "Generated"]
    verified = [event["request_id"] for event in log if event["event"] == "Verified"]
    assert len(set(generated)) == len(generated)
    assert len(set(verified)) == len(verified)
    assert set(verified) <= set(generated)
    place = {request_id: i for i, request_id in enumerate(generated)}
    assert all(place[request_id] < len(generated) for request_id in verified)
    # The rewards are those of the format and of a right answer, nothing in between.
    assert {round(sum(event["parts"]), 6) for event in log if event["event"] == "Verified"} == {0.1, 1.0}


def test_versions_and_staleness_are_sane(finished_run: pathlib.Path):
    rollouts, metrics = lines(finished_run, "rollouts.jsonl"), lines(finished_run, "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert collections.Counter(line["step"] for line in rollouts) == {1: BATCH, 2: BATCH, 3: BATCH}
    for line in rollouts:
        # Step s trains the weights of version s - 1.
        assert 0 <= line["version_min"] <= line["version_max"] <= line["step"] - 1
    assert metrics[0]["staleness"] == metrics[0]["staleness_max"] == 0
    for line in metrics:
        oldest = min(r["version_min"] for r in rollouts if r["step"] == line["step"])
        assert line["staleness_max"] == line["step"] - 1 - oldest <= 8
        assert 0 <= line["staleness"] <= line["staleness_max"]
        assert 0 <= line["swapped_token_share"] <= 1


def test_metrics_and_rollouts_tell_the_same_story(finished_run: pathlib.Path):
    rollouts = lines(finished_run, "rollouts.jsonl")
    for metrics in lines(finished_run, "metrics.jsonl"):
        members = [line for line in rollouts if line["step"] == metrics["step"]]
        for name, column in (("reward", "reward"), ("completion_length", "completion_tokens")):
            np.testing.assert_allclose(metrics[name], np.mean([line[column] for line in members]), rtol=1e-6)
        is_right = [line["verdict"] == Verdict.CORRECT.value for line in members]
        assert metrics["pass_rate"] == np.mean(is_right)
        # Groups without variance were filtered, so the advantages of a batch are a standardised sample.
        advantages = [line["advantage"] for line in members]
        np.testing.assert_allclose([np.mean(advantages), np.std(advantages)], [0, 1], atol=1e-5)
        for problem in {line["problem"] for line in members}:
            assert len({line["reward"] for line in members if line["problem"] == problem}) > 1
        # Sampled and trained by one forward: the fresh tokens of the first step have ratio 1.
        if metrics["step"] == 1:
            assert abs(metrics["logprob_gap"]) < 1e-4
            assert metrics["clip_fraction"] == 0
        assert metrics["grad_norm"] > 0
        assert 0 < metrics["padding_share"] < 1
    for line in rollouts:
        assert line["completion"].startswith("<think>.")
        assert line["completion"].endswith(f"\\boxed{{{line['answer']}}}")
        assert (line["answer"] == line["reference"]) == (line["verdict"] == "correct")
        assert line["prompt"].startswith("<bos>")


def test_the_folder_can_be_looked_at_and_loaded(finished_run: pathlib.Path, tiny: Any):
    page = (finished_run / "report.html").read_text()
    assert "</html>" in page
    assert "\\boxed{" in page
    assert list((finished_run / "tensorboard").iterdir())
    config = config_from_json((finished_run / "config.json").read_text())
    assert config.batch.group_size == GROUP

    policy = finished_run / "policy"
    assert isinstance(load_tokenizer(policy, tiny.config.vocab_size), ByteTokenizer)
    assert read_model_config(policy) == tiny.config
    step, state, _ = restored(finished_run, tiny.model())
    assert step == STEPS
    assert int(state.num_updates) == STEPS
    loaded = load_params(policy, tiny.config)
    jax.tree.map(np.testing.assert_array_equal, loaded, state.params)
    first = load_params(tiny.model(), tiny.config)
    assert float(optax.tree.norm(jax.tree.map(np.subtract, loaded, first))) > 0


def test_no_training_problem_is_an_evaluation_problem(finished_run: pathlib.Path, tiny: Any):
    held_out = {f"<bos>{problem.statement}\n" for problem in load_problems(tiny.sums, 4, EVALUATION_SEED)}
    prompts = {line["prompt"] for line in lines(finished_run, "rollouts.jsonl")}
    assert len(held_out) == 4
    assert len(prompts) >= 2
    assert prompts.isdisjoint(held_out)


# --- stop and go on --------------------------------------------------------------------------------------------------


def interrupt_when(is_time: Callable[[], bool]) -> threading.Thread:
    """Sends this process a Ctrl-C once; the caller's run must have taken the signal over by then."""
    return call_when(is_time, lambda: os.kill(os.getpid(), signal.SIGINT))


def call_when(is_time: Callable[[], bool], action: Callable[[], Any]) -> threading.Thread:
    """Does something once, beside the caller's run."""

    def watch() -> None:
        end = time.monotonic() + 300
        while not is_time() and time.monotonic() < end:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_ctrl_c_saves_and_resume_goes_on(tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    settings = {"run.folder": folder, "schedule.num_steps": 1000}
    watcher = interrupt_when(lambda: len(lines(folder, "metrics.jsonl")) >= 2)
    handler = signal.getsignal(signal.SIGINT)
    tiny.run("train", settings)
    watcher.join()
    assert signal.getsignal(signal.SIGINT) is handler
    stopped_at = len(lines(folder, "metrics.jsonl"))
    assert f"stopped after step {stopped_at}; go on with --resume" in capsys.readouterr().err
    assert 2 <= stopped_at < 1000
    assert not (folder / "summary.json").exists()
    step, _, schedule = restored(folder, tiny.model())
    assert step == schedule["num_done"] == stopped_at
    ended = sum(count for how, count in schedule["counts"].items() if how != "dispatched")
    assert schedule["counts"]["dispatched"] == ended + GROUP * len(schedule["again"] + schedule["ready"])

    before = (folder / "metrics.jsonl").read_bytes()
    tiny.run("train", settings | {"schedule.num_steps": stopped_at + 2}, "--resume")
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == list(range(1, stopped_at + 3))
    counts = collections.Counter(line["step"] for line in lines(folder, "rollouts.jsonl"))
    assert counts == dict.fromkeys(range(1, stopped_at + 3), BATCH)
    found = summary(folder)
    assert found["steps"] == stopped_at + 2
    clock = [line["wall_seconds"] for line in lines(folder, "metrics.jsonl")]  # goes on where the stop left it
    assert clock == sorted(clock)
    assert found["wall_seconds"] > clock[-1]
    assert found["trained"] == (stopped_at + 2) * BATCH
    assert found["dispatched"] == found["trained"] + sum(found["dropped"].values())
    # What was on its way at the stop comes first, before anything new.
    log = events(folder)
    (restart,) = [i for i, event in enumerate(log) if event["event"] == "Resumed"]
    sent_again = {event["request_id"] // GROUP for event in log[restart:] if event["event"] == "Verified"}
    assert set(schedule["again"][:1]) <= sent_again
    assert not any(
        event["request_id"] // GROUP < min([*schedule["again"], schedule["next_group"]])
        for event in log[restart:]
        if event["event"] in ("Generated", "Verified")
    )


@pytest.mark.parametrize(
    ("settings", "words", "expected"),
    [
        ({}, (), "holds a run already; go on with it by --resume"),
        ({"optimizer.learning_rate": 0.5}, ("--resume",), "with other settings of optimizer.learning_rate"),
        ({"run.seed": 1, "loss.eps_high": 0.5}, ("--resume",), "with other settings of run.seed, loss.eps_high"),
    ],
)
def test_a_folder_is_not_mixed_up(
    finished_run: pathlib.Path, refusal: Callable[..., str], settings: dict[str, Any], words: Any, expected: str
):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert expected in refusal("train", {"run.folder": finished_run, "run.tensorboard": True} | settings, *words)
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_other_data_is_no_resume(finished_run: pathlib.Path, refusal: Callable[..., str], tmp_path: pathlib.Path):
    folder = copy(finished_run, tmp_path / "run")
    noted = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(noted | {"fingerprint": "0" * 64}))
    sentence = refusal("train", {"run.folder": folder, "run.tensorboard": True, "schedule.num_steps": 4}, "--resume")
    assert "the run was started with other data" in sentence
    assert config_from_json((folder / "config.json").read_text()).schedule.num_steps == STEPS


def test_nothing_to_resume_is_said(tmp_path: pathlib.Path, refusal: Callable[..., str]):
    assert "holds no run to resume" in refusal("train", {"run.folder": tmp_path / "none"}, "--resume")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("settings", [{"generation.attention": "tpu"}, {"generation.num_pages": 2}], ids=str)
def test_an_engine_that_cannot_be_made_leaves_no_run_behind(
    tmp_path: pathlib.Path, refusal: Callable[..., str], settings: dict[str, Any]
):
    assert "`generation." in refusal("train", {"run.folder": tmp_path / "run"} | settings)
    assert not (tmp_path / "run").exists()


# --- a full disk, and a longer run -----------------------------------------------------------------------------------

# From the first save on, files may not grow past 64 KiB: lines fit, arrays do not. Python ignores SIGXFSZ, so that a
# longer write fails as on a full disk. (Not earlier: a cache of compiled programs must not be cut.)
ON_A_FULL_DISK = """
import resource, sys
from magistral_jax.checkpoint import Checkpoints
from magistral_jax.main import main

def save_on_a_full_disk(self, *args, save=Checkpoints.save):
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    save(self, *args)

Checkpoints.save = save_on_a_full_disk
main(sys.argv[1:])
"""


def test_a_full_disk_is_one_sentence_and_with_room_the_run_goes_on(
    finished_run: pathlib.Path, tiny: Any, tmp_path: pathlib.Path
):
    folder = copy(finished_run, tmp_path / "run")
    settings = {"run.folder": folder, "schedule.num_steps": STEPS + 1, "run.tensorboard": True}
    result = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, "train", *tiny.flags(settings, "--resume")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | CACHE,
    )
    assert result.returncode == 2, result.stderr
    # No traceback of ours. (Now and then one comes from TensorStore, whose pending writes find Orbax's loop closed, on
    # its own thread: before, behind, or on the very line of our sentence.)
    assert "/magistral_jax/" not in result.stderr, result.stderr
    last = f"The latest complete one is {STEPS}; free some space and resume from it."
    assert re.search("error: Could not write [^\n]*" + re.escape(last), result.stderr), result.stderr
    step, state, _ = restored(folder, tiny.model())
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, load_params(finished_run / "policy", tiny.config), state.params)

    tiny.run("train", settings, "--resume")
    found = summary(folder)
    assert found["steps"] == STEPS + 1
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == [1, 2, 3, 4]
    assert found["eval_before"] == summary(finished_run)["eval_before"]
    assert found["mean_completion_length_first"] == summary(finished_run)["mean_completion_length_first"]
    assert found["dispatched"] == found["trained"] + sum(found["dropped"].values())
    step, state, _ = restored(folder, tiny.model())
    assert step == STEPS + 1
    jax.tree.map(np.testing.assert_array_equal, load_params(folder / "policy", tiny.config), state.params)


# The compiled programs of this process serve the other one too.
CACHE = {
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


# --- generators elsewhere --------------------------------------------------------------------------------------------


def test_generators_may_be_processes_and_threads_again_after_a_resume(tiny: Any, tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    small = {"run.folder": folder, "evaluation.num_samples": 1, "data.num_evaluation": 1}
    tiny.run("train", small | {"generation.where": "process", "schedule.num_steps": 1})
    (line,) = lines(folder, "metrics.jsonl")
    assert line["logprob_gap"] < 1e-4  # what the process sampled is what the trainer computes
    assert line["generators_lost"] == 0
    assert (folder / "generator_0.log").exists()
    tiny.run("train", small | {"schedule.num_steps": 2}, "--resume")
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == [1, 2]


class Joining:
    """Starts `magistral-jax generator` as soon as a trainer listens at a port of its own."""

    def __init__(self, log: pathlib.Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._join, daemon=True)
        self._thread.start()

    def _join(self) -> None:
        host, port = self.address.split(":")
        end = time.monotonic() + 240.0
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.1)
        program = "from magistral_jax.main import main; main()"
        command = [sys.executable, "-c", program, "generator", self.address]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(command, env={**os.environ, **CACHE}, stderr=output)

    def wait(self) -> int:
        """Its exit code."""
        self._thread.join()
        assert self.process is not None
        try:
            return self.process.wait(60.0)
        finally:
            self.process.kill()


def test_a_generator_that_joins_samples_and_when_it_is_gone_the_run_ends_with_a_checkpoint(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    folder, joining = tmp_path / "run", Joining(tmp_path / "first.log")
    small = {"run.folder": folder, "evaluation.num_samples": 1, "data.num_evaluation": 1, "generation.where": "remote"}
    small |= {"schedule.role_deadline": 15.0}
    end_of_it = lambda: joining.process is not None and joining.process.kill()
    killer = call_when(lambda: len(lines(folder, "metrics.jsonl")) >= 2, end_of_it)
    with pytest.raises(SystemExit) as exit_:
        tiny.run("train", small | {"generation.listen": joining.address, "schedule.num_steps": 1000})
    killer.join()
    assert joining.wait() == -signal.SIGKILL
    assert exit_.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert f"waiting for generators: magistral-jax generator {joining.address}" in said
    assert "weights go to the generators by tcp (generation.plane = auto)" in said
    # Both wait for as long, the fleet for a generator and the schedule for any news: the first to lose patience speaks.
    nobody_joined = f"error: The generator failed: No generator has joined at {joining.address} for 15 s"
    assert said[-1].startswith((nobody_joined, "error: No role reported anything for 15 s"))
    stopped_at = len(lines(folder, "metrics.jsonl"))
    assert restored(folder, tiny.model())[0] == stopped_at >= 2
    assert all(line["logprob_gap"] < 1e-4 for line in lines(folder, "metrics.jsonl")[:1])

    again = Joining(tmp_path / "second.log")
    settings = small | {"generation.listen": again.address, "schedule.num_steps": stopped_at + 1}
    tiny.run("train", settings, "--resume")
    assert again.wait() == 0
    assert (tmp_path / "second.log").read_text().endswith(f"joined the run of {again.address}\nthe run is over\n")
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == list(range(1, stopped_at + 2))


# --- ablations -------------------------------------------------------------------------------------------------------


def test_the_kl_ablation_keeps_a_reference(tiny: Any, tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    small = {"schedule.num_steps": 2, "evaluation.num_samples": 1, "data.num_evaluation": 1}
    tiny.run("train", {"run.folder": folder, "loss.kl_coef": 0.1} | small)
    first, second = lines(folder, "metrics.jsonl")
    assert abs(first["kl"]) < 1e-6  # the reference is where the policy starts from
    assert second["kl"] > 1e-9
    assert {"pass_at_1", "maj_at_1"} <= summary(folder)["eval_after"].keys()
