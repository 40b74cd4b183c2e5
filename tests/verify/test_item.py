import io
import json
from typing import Any

import pytest

from magistral_jax.records import Problem, Reward, Verdict
from magistral_jax.verify.code_tests import select_tests
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.item import Message, Task, VerifyItem, decode_message, encode_message, encode_task, read_task

REWARD = Reward(Verdict.TIMEOUT, 0.1, 0.0, -0.05, 0.1, "deadline", 5.0, "consistent", "landlock")


def test_tasks_survive_the_wire_as_they_are():
    problem = Problem("p", "é\n\ud800", "\\frac12", extra={"array": [1.5, (2, 3)], "bytes": b"\x00"})
    item = VerifyItem(3, problem, "\u2028\x00", 5, 6, True, group=7, group_size=8, code_language="cpp")
    code = Problem("c", "s", "", kind="code", extra={"tests": [{"input": "1", "output": "\ud800"}], "checker": "lines"})
    tasks = [Task(item, serial=4), Task(item, select_tests(code, CodeConfig(), 0), is_explained=True)]
    stream = io.BytesIO(b"".join(map(encode_task, tasks)))
    assert [read_task(stream) for _ in tasks] == tasks
    assert read_task(stream) is None


def test_messages_survive_the_wire_in_one_line_each():
    for message in (
        Message("ready", pid=7),
        Message("form", REWARD, serial=9),
        Message("verdict", REWARD, growth_mib=1.5, detail="a\nb\u2028\ud800", explanation={"parsed": ["1", "2"]}),
    ):
        line = encode_message(message)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert line.isascii()
        assert decode_message(line) == message


def changed(**fields: Any) -> bytes:
    """A message with some of its reward's fields in another form."""
    message = json.loads(encode_message(Message("verdict", REWARD)))
    message["reward"] |= fields
    return json.dumps(message).encode()


@pytest.mark.parametrize(
    "line",
    [
        *[b"", b"x", b"[]", b"3", b"{}", b"\xff", b'{"kind": "ready", "reward": null}', b'{"reward": 3}'],
        *[
            changed(format="1"),
            changed(correctness=float("nan")),
            changed(length=float("-inf")),
            changed(language=True),
        ],
        *[changed(verdict="fine"), changed(path=3), changed(path=None), changed(more=1)],
    ],
)
def test_nonsense_is_one_kind_of_error(line: bytes):
    """And none of it gets as far as a reward."""
    with pytest.raises(ValueError, match=r"."):
        decode_message(line)
