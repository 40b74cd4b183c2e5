"""The compiler is made ready once, for all processes; what is missing is said in one sentence."""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from magistral_jax.records import MagistralError
from magistral_jax.verify import code_toolchain
from magistral_jax.verify.code_toolchain import FLAGS, prepare_toolchain


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty cache that everyone can enter."""
    with tempfile.TemporaryDirectory() as place:
        pathlib.Path(place).chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        yield pathlib.Path(place) / "magistral_jax"


def includes(source: str) -> str:
    """Headers that are opened, as the compiler lists them: `!` before a precompiled one that is used."""
    toolchain = prepare_toolchain("g++")
    command = [toolchain.compiler, *toolchain.flags, f"-I{toolchain.headers}", "-H", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=True)
    return done.stderr


def test_the_precompiled_header_is_used():
    for before in ("", "// a comment\n", "#define LOCAL\n"):
        listed = includes(f"{before}#include <bits/stdc++.h>\nint main() {{}}\n")
        assert re.match(r"! \S+/bits/stdc\+\+\.h\.gch\n", listed), listed
        assert "\n." not in listed, "no header is read as text"
    # Where it cannot be used, the text beside it is, and means the same.
    listed = includes("#define _GLIBCXX_DEBUG\n#include <bits/stdc++.h>\nint main() {}\n")
    assert "! " not in listed
    assert re.search(r"^\. \S+/bits/stdc\+\+\.h$", listed, re.MULTILINE)


PREPARE = "from magistral_jax.verify.code_toolchain import prepare_toolchain\nprint(prepare_toolchain('g++').headers)\n"


def test_one_of_several_processes_compiles_the_header(cache: pathlib.Path):
    (cache / ".headers-abandoned" / "built").mkdir(parents=True)  # of a process that was killed
    started = [subprocess.Popen([sys.executable, "-c", PREPARE], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (folder,) = map(pathlib.Path, printed)
    assert folder.parent == cache
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, "headers.lock"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    toolchain = prepare_toolchain("g++")
    assert toolchain.headers == folder
    assert toolchain.flags[: len(FLAGS)] == FLAGS
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*")), "other users may read it"


def test_a_missing_compiler():
    with pytest.raises(MagistralError) as error:
        prepare_toolchain("no-such-compiler")
    assert str(error.value) == (
        "code.compiler: no C++ compiler 'no-such-compiler' on this machine; install one "
        "(Debian, Ubuntu: apt install g++)"
    )


def fake_compiler(folder: pathlib.Path, script: str) -> str:
    path = folder / "fake-g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


BANNER = "case $1 in --version) echo 'g++ 1.0 Free Software Foundation'; exit 0;; esac\n"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo Apple clang version 15.0", "is not GCC; expected g++ (Debian, Ubuntu: apt install g++)"),
        ("echo broken >&2; exit 1", "cannot build C++20 programs: broken"),
        (
            BANNER + "echo \"error: unrecognized command-line option '-std=c++20'\" >&2; exit 1",
            "cannot build C++20 programs: error: unrecognized command-line option '-std=c++20'",
        ),
        (BANNER + "exit 3", "cannot build C++20 programs: exit code 3"),
        (BANNER + "echo none", "has no header <bits/stdc++.h>; expected GCC's own C++ library"),
    ],
)
def test_a_compiler_that_is_of_no_use(script: str, sentence: str, tmp_path: pathlib.Path, cache: pathlib.Path):
    compiler = fake_compiler(tmp_path, script)
    with pytest.raises(MagistralError) as error:
        prepare_toolchain(compiler)
    assert str(error.value) == f"code.compiler: {compiler} {sentence}"
    assert not list(cache.glob("*headers-*")), "nothing half-made is left"


@pytest.fixture
def small_header(monkeypatch: pytest.MonkeyPatch):
    """A small header in the place of the large one, so that these tests take no seconds."""
    monkeypatch.setattr(code_toolchain, "_HEADER", "cstddef")


def install(folder: pathlib.Path, before: str = "") -> str:
    """A compiler with a folder of its own, which does what the system's does."""
    (folder / "bin").mkdir(parents=True)
    own = f"case $1 in -print-search-dirs) echo 'install: {folder}/lib/gcc/machine/12/'; exit 0;; esac\n"
    return fake_compiler(folder / "bin", f'{own}{before}\nexec {shutil.which("g++")} "$@"')


def test_static_libraries_may_be_missing(tmp_path: pathlib.Path, cache: pathlib.Path, small_header: None):
    compiler = install(tmp_path / "gcc", "for word; do [ $word = -static ] && exit 1; done")
    assert prepare_toolchain(compiler).flags == FLAGS


def test_a_compiler_that_cannot_link(tmp_path: pathlib.Path, cache: pathlib.Path, small_header: None):
    refuse = "for word; do case $word in */probe) echo 'cannot find -lstdc++' >&2; exit 1;; esac; done"
    with pytest.raises(MagistralError, match=r"cannot build C\+\+20 programs: cannot find -lstdc\+\+"):
        prepare_toolchain(install(tmp_path / "gcc", refuse))


def test_the_box_shows_a_compilers_own_folder(tmp_path: pathlib.Path, cache: pathlib.Path, small_header: None):
    assert prepare_toolchain("g++").installation == ""
    compiler = install(tmp_path / "gcc")
    toolchain = prepare_toolchain(compiler)
    assert (toolchain.compiler, toolchain.installation) == (compiler, str(tmp_path / "gcc"))


def test_the_box_does_not_show_a_home(
    tmp_path: pathlib.Path, cache: pathlib.Path, small_header: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(
        MagistralError, match="use one that is installed in /usr, or in a folder that holds nothing else"
    ):
        prepare_toolchain(install(tmp_path / "home"))
    wrapper = fake_compiler(tmp_path, f'exec {shutil.which("g++")} "$@"')  # its libraries are elsewhere
    with pytest.raises(MagistralError, match="there is no such folder of its own"):
        prepare_toolchain(wrapper)
