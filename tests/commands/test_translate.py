"""Translation from the command line, by endpoints that behave, misbehave and die; each is a real HTTP server."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from magistral_jax.data.sources import load_problems
from magistral_jax.main import main
from magistral_jax.serve.server import address_of, bind

SENTENCES = {
    "French": "Voici la traduction de ce petit problème en français, avec toutes ses valeurs :",
    "Spanish": "Esta es la traducción de este pequeño problema al español, con todos sus valores:",
    "Italian": "Ecco la traduzione di questo piccolo problema in italiano, con tutti i suoi valori:",
    "German": "Das ist die Übersetzung dieser kleinen Aufgabe ins Deutsche, mit allen ihren Werten:",
    "Chinese": "这是这道小题目的中文翻译，包括所有的数值：",  # noqa: RUF001
    "Russian": "Вот перевод этой небольшой задачи на русский язык со всеми её значениями:",  # noqa: RUF001
}
MARK = re.compile(r"\[\[\d+\]\]")


def translation(body: dict[str, Any]) -> str:
    """A sentence in the language that is asked for, and all marks, the last one first."""
    system, user = (message["content"] for message in body["messages"])
    language = next(name for name in SENTENCES if f"into {name}" in system)
    return " ".join([SENTENCES[language], *reversed(MARK.findall(user))])


class FakeEndpoint:
    """Answers as `reply` says: a text, or a ready response."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], str | Response] = translation
        self.finish_reason = "stop"
        self.models = ["fake"]
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.num_running = self.most_running = 0
        self._bound = bind("127.0.0.1", 0)
        self.url = f"{address_of(self._bound)}/v1"
        routes = [
            Route("/v1/models", self._list),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[self._bound]), daemon=True)
        self._thread.start()

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers["authorization"])
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        reply = await run_in_threadpool(self.reply, body)
        self.num_running -= 1
        if isinstance(reply, Response):
            return reply
        choice = {"index": 0, "finish_reason": self.finish_reason, "message": {"role": "assistant", "content": reply}}
        return JSONResponse(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}
        )

    def die(self) -> None:
        """Nobody listens any more; what is under way ends."""
        self._server.should_exit = True
        self._bound.close()

    def close(self) -> None:
        self.die()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[[], FakeEndpoint]]:
    endpoints: list[FakeEndpoint] = []

    def run() -> FakeEndpoint:
        endpoints.append(FakeEndpoint())
        return endpoints[-1]

    yield run
    for endpoint in endpoints:
        endpoint.close()


@pytest.fixture
def endpoint(start: Callable[[], FakeEndpoint]) -> FakeEndpoint:
    return start()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """60 English problems and 10 in French that do not say so."""
    path = tmp_path_factory.mktemp("problems") / "raw.jsonl"
    problems = [
        *load_problems("templated:sums?language=en", 60, 0),
        *load_problems("templated:sums?language=fr", 10, 0),
    ]
    rows = [{"id": p.id, "problem": p.statement, "answer": p.answer, "level": 3} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(source: pathlib.Path, endpoint: FakeEndpoint, folder: pathlib.Path, *more: str) -> list[str]:
    settings = ["--share=0.4", "--chunk=8", "--concurrency=4", "--retries=2"]
    return ["translate", str(source), f"--out={folder}", f"--endpoint={endpoint.url}", *settings, *more]


def test_translated_rows_stand_in_the_places_of_their_originals(
    source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path, capsys: Any
):
    main(words(source, endpoint, tmp_path / "out"))
    before, after = read(source), read(tmp_path / "out" / "translated.jsonl")
    assert [row["answer"] for row in after] == [row["answer"] for row in before]
    assert {row["level"] for row in after} == {3}
    numbers = lambda text: sorted(re.findall(r"\d+", text))
    for old, new in zip(before, after, strict=True):
        if new["original_id"] is None:
            assert (new["id"], new["problem"]) == (old["id"], old["problem"])
            assert new["language"] == ("fr" if old["id"].startswith("sums:fr") else "en")
        else:
            assert (new["original_id"], new["id"]) == (old["id"], f"{old['id']}:{new['language']}")
            assert numbers(new["problem"]) == numbers(old["problem"])
            assert "[[" not in new["problem"]
    made = collections.Counter(row["language"] for row in after if row["original_id"])
    assert made == dict.fromkeys(("fr", "es", "it", "de", "zh", "ru"), 4)
    assert len(endpoint.bodies) == 24
    assert 1 < endpoint.most_running <= 4
    table = capsys.readouterr().out
    assert "| can be translated | 70 | 60 | 10 not in English |" in table
    assert "| into French | 4 | 4 | - |" in table
    assert (tmp_path / "out" / "table.md").read_text() == table


def english(body: dict[str, Any]) -> str:
    return body["messages"][1]["content"]


@pytest.mark.parametrize(
    ("reply", "reason", "num_requests"),
    [
        (lambda body: MARK.sub("", translation(body)), "placeholder lost", 3),
        (lambda body: translation(body) + " [[1]]", "placeholder repeated", 3),
        (lambda body: translation(body) + " 17", "number added", 3),
        (english, "wrong language", 3),
        (lambda body: "", "empty", 3),
        (lambda body: Response("{}", 400), "refused", 1),
        (lambda body: Response("<html>", media_type="text/html"), "endpoint error", 3),
        (lambda body: Response("{}", 503, {"retry-after-ms": "1"}), "endpoint error", 9),  # sent again twice
    ],
)
def test_what_cannot_be_translated_stays_in_english_and_is_counted(
    reply: Any, reason: str, num_requests: int, source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path
):
    endpoint.reply = reply
    main(words(source, endpoint, tmp_path / "out", "--share=0.1", "--languages", "de", "ru"))
    assert [row["problem"] for row in read(tmp_path / "out" / "translated.jsonl")] == [
        row["problem"] for row in read(source)
    ]
    kept = read(tmp_path / "out" / "kept_in_english.jsonl")
    assert collections.Counter((row["language"], row["reason"]) for row in kept) == {
        ("de", reason): 3,
        ("ru", reason): 3,
    }
    assert f"| into German | 3 | 0 | 3 {reason} |" in (tmp_path / "out" / "table.md").read_text()
    seeds = collections.Counter(body["seed"] for body in endpoint.bodies)
    assert len(endpoint.bodies) == 6 * num_requests
    assert len(seeds) == (6 if num_requests == 1 else 18)


def test_an_answer_that_was_cut_is_not_taken(source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path):
    endpoint.finish_reason = "length"
    main(words(source, endpoint, tmp_path / "out", "--share=0.02"))
    assert [row["reason"] for row in read(tmp_path / "out" / "kept_in_english.jsonl")] == ["cut off"]


def test_a_busy_endpoint_is_asked_again(source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path):
    seen: set[int] = set()

    def busy_at_first(body: dict[str, Any]) -> str | Response:
        if body["seed"] in seen:
            return translation(body)
        seen.add(body["seed"])
        return Response("{}", 429, {"retry-after-ms": "1"})

    endpoint.reply = busy_at_first
    main(words(source, endpoint, tmp_path / "out", "--attempts=1"))
    assert read(tmp_path / "out" / "kept_in_english.jsonl") == []
    assert len(endpoint.bodies) == 48


@pytest.fixture
def whole(source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path) -> bytes:
    """The result of a run that nothing disturbs."""
    main(words(source, endpoint, tmp_path / "whole"))
    return (tmp_path / "whole" / "translated.jsonl").read_bytes()


def test_an_endpoint_that_dies_is_said_and_another_one_goes_on(
    whole: bytes, source: pathlib.Path, start: Any, tmp_path: pathlib.Path, capsys: Any
):
    dying, folder = start(), tmp_path / "out"

    def die_in_the_second_chunk(body: dict[str, Any]) -> str | Response:
        if len(dying.bodies) > 8:
            dying.die()
            time.sleep(0.2)
            return Response("{}", 429, {"retry-after-ms": "1"})
        return translation(body)

    dying.reply = die_in_the_second_chunk
    with pytest.raises(SystemExit) as exit_:
        main(words(source, dying, folder))
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"what is in {folder} stays; go on with --resume" in said
    assert f"error: nobody answers at {dying.url}" in said
    assert len(read(folder / "answers.jsonl")) == 8
    assert not (folder / "translated.jsonl").exists()
    other = start()
    main(words(source, other, folder, "--resume"))
    assert (folder / "translated.jsonl").read_bytes() == whole
    assert len(other.bodies) == 16


def test_a_kill_and_a_resume_give_the_same_file(
    whole: bytes, source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path
):
    folder, going_on = tmp_path / "out", threading.Event()
    endpoint.bodies.clear()

    def wait_in_the_second_chunk(body: dict[str, Any]) -> str:
        if len(endpoint.bodies) > 8:
            going_on.wait(60)
        return translation(body)

    endpoint.reply = wait_in_the_second_chunk
    run = "from magistral_jax.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", run, *words(source, endpoint, folder)], stderr=subprocess.DEVNULL)
    while len(endpoint.bodies) <= 8:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    going_on.set()
    endpoint.reply = translation
    main(words(source, endpoint, folder, "--resume"))
    assert (folder / "translated.jsonl").read_bytes() == whole


def test_ctrl_c_ends_at_once_and_keeps_what_there_is(
    whole: bytes, source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path, capsys: Any
):
    folder = tmp_path / "out"
    endpoint.bodies.clear()

    def interrupt_in_the_second_chunk(body: dict[str, Any]) -> str:
        if len(endpoint.bodies) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return translation(body)

    endpoint.reply = interrupt_in_the_second_chunk
    with pytest.raises(SystemExit) as exit_:
        main(words(source, endpoint, folder, "--concurrency=1"))
    assert exit_.value.code == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert len(read(folder / "answers.jsonl")) == 8
    endpoint.reply = translation
    main(words(source, endpoint, folder, "--concurrency=2", "--resume"))
    assert (folder / "translated.jsonl").read_bytes() == whole


def test_the_key_is_sent_and_not_written_down(source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path):
    (tmp_path / "key").write_text("open sesame\n")
    main(words(source, endpoint, tmp_path / "out", "--share=0.02", f"--key-file={tmp_path / 'key'}"))
    assert endpoint.keys == {"Bearer open sesame"}
    assert all("sesame" not in path.read_text() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--endpoint=127.0.0.1:8000"], "`translate.endpoint` is `127.0.0.1:8000`; expected an address such as"),
        (["--endpoint=http://127.0.0.1:9/v1"], "nobody answers at http://127.0.0.1:9/v1"),
        (["--languages", "fr", "nl"], "`translate.languages` has `nl`; expected some of fr, es, it, de, zh, ru."),
        (["--key-file=none.txt"], "`translate.key_file` is `none.txt`, which cannot be read"),
        (["--share=1.5"], "`translate.share` is 1.5; it must lie in [0, 1]."),
        (["--shares=0.5"], "unknown setting `shares`; the nearest is"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(
    more: list[str], sentence: str, source: pathlib.Path, endpoint: FakeEndpoint, tmp_path: pathlib.Path, capsys: Any
):
    with pytest.raises(SystemExit) as exit_:
        main(words(source, endpoint, tmp_path / "out", *more))
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("models", "status", "sentence"),
    [
        (["a", "b"], 200, "`translate.model` is empty and the endpoint lists a, b; expected the name of one."),
        (["fake"], 401, "refuses the key (401); expected one in the file `translate.key_file`"),
        (["fake"], 404, "has no chat completions by `fake` (404)"),
    ],
)
def test_what_an_endpoint_refuses_is_named(
    models: list[str],
    status: int,
    sentence: str,
    source: pathlib.Path,
    endpoint: FakeEndpoint,
    tmp_path: pathlib.Path,
    capsys: Any,
):
    endpoint.models, endpoint.reply = models, lambda body: Response("{}", status)
    with pytest.raises(SystemExit) as exit_:
        main(words(source, endpoint, tmp_path / "out"))
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
