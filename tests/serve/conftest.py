"""A service over a tiny random model, listening on a free port for as long as the tests run.

The tokenizer has one token for each byte and a chat template, so that completions of random weights are full of broken
characters, which is what streaming has to get right.
"""

import contextlib
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jax
import numpy as np
import openai
import pytest
import tokenizers

from magistral_jax.commands.serve import make_server
from magistral_jax.config import Config, load
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import save_folder
from magistral_jax.policy.transformer import init_params
from magistral_jax.serve.server import Server, address_of, bind

MODEL = ModelConfig(
    vocab_size=264, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48, max_positions=1024
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKEN = "open sesame"
SETTINGS = {
    "generation.num_slots": 8,
    "generation.page_size": 8,
    "generation.max_prompt_tokens": 160,
    "generation.max_new_tokens": 800,
    "generation.decode_block": 4,
    "generation.prefill_rows": 2,
    "generation.prefill_chunk": 64,
    "serve.port": 0,
    "serve.model_name": "tiny",
    "serve.max_pending": 8,
    "serve.max_choices": 12,
    "serve.max_body_mib": 1,
    "serve.warm_up": False,
}


def make_tokenizer(folder: pathlib.Path) -> None:
    """A token for each byte, then the control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(folder: pathlib.Path, seed: int, model: ModelConfig = MODEL) -> pathlib.Path:
    """A folder with random weights, large enough for the samples to depend on the prompt."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    fill = lambda leaf: rng.normal(1.0 if leaf.ndim <= 2 and leaf.shape[-1] == 32 else 0.0, 0.2, leaf.shape)
    params = jax.tree.map(lambda leaf: fill(leaf).astype(np.float32), shapes)
    params["head"]["kernel"][:, 259] = 0  # completions are long: the stop token is never likely
    save_folder(folder, params, model, model_type="mistral")
    make_tokenizer(folder)
    return folder


class Running:
    """A service in a thread of its own, and its clients."""

    def __init__(self, config: Config, bound: socket.socket) -> None:
        self.config = config
        self.url = address_of(bound)
        self.server: Server = make_server(config, bound)
        self._bound = bound
        self._thread = threading.Thread(target=lambda: self.server.run(sockets=[bound]), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)
        self.wait_for(lambda: self.server.started)

    def admin(self, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        """An admin route, with the token."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        if path == "stats":
            answer = self.http.get("/admin/stats", headers=headers)
        else:
            answer = self.http.post(f"/admin/{path}", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, prompt: Any, **changes: Any) -> dict[str, Any]:
        """The JSON of a completion."""
        answer = self.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt} | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def text(self, prompt: Any, **changes: Any) -> str:
        """The text of the first choice."""
        return self.complete(prompt, **changes)["choices"][0]["text"]

    def wait_until_ended(self) -> None:
        """The service has nobody left and is gone."""
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """End it as Ctrl-C does."""
        self.openai.close()
        self.http.close()
        if self._thread.is_alive():
            self.server.handle_exit(2, None)
        self.wait_until_ended()
        self._bound.close()

    @staticmethod
    def wait_for(holds: Callable[[], Any]) -> None:
        """Wait until something holds; far longer than it should take."""
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], pathlib.Path]:
    root = tmp_path_factory.mktemp("served")

    def folder(seed: int) -> pathlib.Path:
        path = root / f"seed{seed}"
        return path if path.exists() else make_model(path, seed)

    return folder


@pytest.fixture(scope="session")
def start(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with start(name=value, …) as running` starts a service of its own with settings changed."""
    token_file = tmp_path_factory.mktemp("token") / "token"
    token_file.write_text(TOKEN + "\n")

    @contextlib.contextmanager
    def run(**changes: Any) -> Iterator[Running]:
        named = {name.replace("__", "."): value for name, value in changes.items()}
        settings = SETTINGS | {"policy.path": models(0), "serve.admin_token_file": token_file} | named
        config = load([f"--{name}={value}" for name, value in settings.items()])
        running = Running(config, bind("127.0.0.1", 0))
        try:
            yield running
        finally:
            running.close()

    return run


@pytest.fixture(scope="session")
def service(start: Any) -> Iterator[Running]:
    """The one that most tests share; each leaves it empty."""
    with start() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of the shared service: no slot, no page, no job is held."""
    yield
    if "service" in request.fixturenames:
        running = request.getfixturevalue("service")
        running.wait_for(lambda: running.admin("stats")["free_pages"] == running.admin("stats")["num_pages"])
        stats = running.admin("stats")
        assert stats["num_running"] == stats["num_waiting"] == stats["num_scoring"] == 0
