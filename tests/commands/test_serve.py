"""The service as a command: what it says, how it ends, and what its clients see when it is killed."""

import contextlib
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from magistral_jax.data.tokenizer import ByteTokenizer
from magistral_jax.policy.hf_folder import load_params, save_folder

SETTINGS = {
    "generation.max_prompt_tokens": 24,
    "generation.max_new_tokens": 200,
    "generation.num_slots": 2,
    "generation.prefill_rows": 1,
    "generation.decode_block": 1,
    "serve.port": 0,
}


class Command:
    """A running `magistral-jax serve`, its lines on standard error, and a client."""

    def __init__(self, words: list[str]) -> None:
        cache = pathlib.Path(__file__).parents[2] / ".jax_cache"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
        words = [sys.executable, "-c", "from magistral_jax.main import main; main()", "serve", *words]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        self._lines: queue.Queue[str] = queue.Queue()
        self.said = ""
        threading.Thread(target=self._read, daemon=True).start()
        ready = self.wait_for(r"serving (\S+) at (http://127\.0\.0\.1:\d+/v1)")
        self.client = openai.OpenAI(base_url=ready[2], api_key="none", max_retries=0, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that has the pattern."""
        while True:
            line = self._lines.get(timeout=120)
            self.said += line
            if found := re.search(pattern, line):
                return found

    def stream(self) -> Any:
        """A completion of which the first text has come."""
        events = self.client.completions.create(model="talker", prompt="1+1=\n", max_tokens=200, stream=True)
        next(events)
        return events

    def close(self) -> None:
        """Leave nothing behind."""
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start(tiny: Any, tmp_path: pathlib.Path) -> Callable[..., Any]:
    """`with start(…)` runs the command on a policy that thinks in dots until its limit."""
    folder = tmp_path / "talker"
    params = load_params(tiny.model(), tiny.config)
    params["head"]["kernel"][:, ByteTokenizer.special_tokens["</think>"]] = -20
    save_folder(folder, params, tiny.config, model_type="mistral", tokenizer_from=tiny.model())

    @contextlib.contextmanager
    def run(**changes: Any) -> Iterator[Command]:
        settings = SETTINGS | {"policy.path": folder} | {k.replace("__", "."): v for k, v in changes.items()}
        command = Command([f"--{name}={value}" for name, value in settings.items()])
        try:
            yield command
        finally:
            command.close()

    return run


def test_ctrl_c_lets_a_stream_end_and_the_code_is_0(start: Any):
    with start() as command:
        shapes = r"prefill 1×\d+.*; decode 2×1; score 1×64, 1×512"
        assert re.search(r"compiled in \d+ s \(rows × tokens\): " + shapes, command.said)
        assert "serving talker at http://127.0.0.1:" in command.said
        assert re.search(r"2 slots, \d+ pages of 16 tokens", command.said)
        events = command.stream()
        command.process.send_signal(signal.SIGINT)
        rest = "".join(event.choices[0].text for event in events)
        assert set(rest) == {"."}
        assert len(rest) == 199
        assert command.process.wait(60) == 0
        command.wait_for("ending: running requests go on, new ones are refused")


def test_a_killed_service_is_an_error_for_its_clients(start: Any):
    with start(serve__warm_up="false", batch__row_tokens=64) as command:  # rows of a trainer bound nothing here
        events = command.stream()
        command.process.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(events)
        with pytest.raises(openai.APIConnectionError):
            command.stream()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"serve.host": "no.such.host.invalid"}, "error: cannot listen on `serve.host` no.such.host.invalid, "),
        ({"serve.port": 99999}, "error: `serve.port` is 99999; it must lie in [0, 65535]."),
        ({"serve.admin_token_file": "nowhere"}, "error: `serve.admin_token_file`: cannot read nowhere: "),
        (
            {"serve.admin_token_file": os.devnull},
            "error: `serve.admin_token_file`: /dev/null is empty; expected a token.",
        ),
        ({"policy.path": ""}, "error: `policy.path` is empty; "),
    ],
)
def test_a_mistake_is_one_sentence(refusal: Callable[..., str], settings: dict[str, Any], sentence: str):
    assert refusal("serve", {"serve.port": 0} | settings).startswith(sentence)
