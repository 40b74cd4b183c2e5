"""`magistral-jax generator`: one sentence where it cannot join; `tests/generate/test_remote_fleet.py` has real ones."""

import pathlib
import socket

import pytest

from magistral_jax.main import main


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["generator", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_dead_address_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as dead:
        address = f"127.0.0.1:{dead.getsockname()[1]}"
    assert error_of([address], capsys) == f"error: No trainer answers at {address}: Connection refused.\n"


def test_a_missing_token_is_one_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "token"
    sentence = f"error: {path}: cannot read the token: No such file or directory.\n"
    assert error_of(["127.0.0.1:1", "--token-file", str(path)], capsys) == sentence


def test_what_is_no_address_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    assert error_of(["gpu7"], capsys) == "error: `gpu7` is no address; expected HOST:PORT.\n"
