"""The choice of a mechanism, and what is said where none holds."""

import logging
import os
import subprocess
import sys

import pytest

from magistral_jax.records import MagistralError
from magistral_jax.verify.sandbox import self_test
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.execution import Limits, Mechanism
from magistral_jax.verify.sandbox.mechanism import SandboxUnavailable, choose_mechanism


@pytest.fixture(autouse=True)
def _choose_anew():
    choose_mechanism.cache_clear()
    yield
    choose_mechanism.cache_clear()


@pytest.fixture
def without_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_auto_takes_bubblewrap():
    assert choose_mechanism("auto") is choose_mechanism() is Mechanism.BUBBLEWRAP


def test_auto_takes_landlock_where_bubblewrap_is_missing(without_bubblewrap):
    assert choose_mechanism("auto") is Mechanism.LANDLOCK


def test_a_named_mechanism_is_the_only_one(without_bubblewrap):
    assert choose_mechanism("landlock") is Mechanism.LANDLOCK
    with pytest.raises(SandboxUnavailable) as caught:
        choose_mechanism("bubblewrap")
    assert "bubblewrap: bwrap is not installed" in str(caught.value)
    assert "apt install bubblewrap" in str(caught.value)
    assert "Landlock" not in str(caught.value)


def test_where_nothing_holds_each_mechanism_is_named_with_its_error(monkeypatch):
    def fail(mechanism):
        raise BoxError(f"{mechanism.value} is broken")

    monkeypatch.setattr("magistral_jax.verify.sandbox.mechanism.self_test", fail)
    with pytest.raises(SandboxUnavailable) as caught:
        choose_mechanism("auto")
    for text in ("bubblewrap: bubblewrap is broken", "landlock: landlock is broken", "apt install bubblewrap", "5.13"):
        assert text in str(caught.value)


def test_the_test_is_made_once(monkeypatch):
    calls = []
    monkeypatch.setattr("magistral_jax.verify.sandbox.mechanism.self_test", calls.append)
    for _ in range(3):
        assert choose_mechanism("auto") is Mechanism.BUBBLEWRAP
    assert calls == [Mechanism.BUBBLEWRAP]


def test_unsafe_has_to_be_named_and_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_mechanism("unsafe") is choose_mechanism("unsafe") is Mechanism.UNSAFE
    assert [record.message for record in caplog.records] == [
        "untrusted programs run without a sandbox (mechanism unsafe)"
    ]


def test_an_unknown_name_is_the_users_mistake():
    with pytest.raises(MagistralError, match="'docker' is none of auto, bubblewrap, landlock, unsafe"):
        choose_mechanism("docker")


ATTACKS = dict(self_test.ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_box_that_an_attack_escapes_from_is_refused(name, monkeypatch):
    """Limits alone confine nothing, so each attack of the self-test has its way; for memory's they are raised."""
    monkeypatch.setattr(self_test, "ATTACKS", {name: ATTACKS[name]})
    if name == "take 400 MB of memory":
        monkeypatch.setattr(self_test, "LIMITS", Limits(memory_mib=1000))
    if name == "become another user" and os.geteuid() != 0:
        return  # only root can, also without a sandbox
    with pytest.raises(BoxError, match=f"a program in the box could {name}"):
        self_test.self_test(Mechanism.UNSAFE)


CONTAINER = """
import errno, os, struct, sys
from magistral_jax.verify.sandbox import seccomp, syscalls
from magistral_jax.verify.sandbox.mechanism import choose_mechanism

# As container engines do: unshare, mount and namespaces by clone are refused; Landlock too where asked for.
load, jump_equal, jump_set, leave = 0x20, 0x15, 0x45, 0x06
refuse = 0x00050000 | errno.EPERM
machine = os.uname().machine
numbers = {"x86_64": (272, 165), "aarch64": (97, 40)}[machine]
if sys.argv[1] == "no-landlock":
    numbers = (*numbers, syscalls.OWN[machine]["landlock_create_ruleset"])
code = [(load, 0, 0, 0)]
for number in numbers:
    code += [(jump_equal, 0, 1, number), (leave, 0, 0, refuse)]
code += [(jump_equal, 0, 1, 435), (leave, 0, 0, 0x00050000 | errno.ENOSYS)]
code += [(jump_equal, 0, 3, syscalls.CONDITIONAL[machine]["clone"]), (load, 0, 0, 16)]
code += [(jump_set, 0, 1, 0x7E020000), (leave, 0, 0, refuse), (leave, 0, 0, 0x7FFF0000)]
seccomp.install(b"".join(struct.pack("<HBBI", *instruction) for instruction in code))
print(choose_mechanism("auto").value)
"""


def in_container(*arguments):
    return subprocess.run([sys.executable, "-c", CONTAINER, *arguments], capture_output=True, text=True, check=False)


def test_in_a_container_without_namespaces_it_is_landlock():
    ended = in_container("landlock")
    assert ended.stdout == "landlock\n", ended.stderr


def test_in_a_container_without_either_both_are_named():
    message = in_container("no-landlock").stderr.strip().rpartition("\n")[2]
    assert "SandboxUnavailable: no sandbox for untrusted programs on this machine: bubblewrap: bwrap: " in message
    assert "landlock: " in message
    assert "landlock_create_ruleset: Operation not permitted" in message
