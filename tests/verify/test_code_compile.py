"""The compiler in its box: cached by content, cleaned up after, and deaf to sources that ask for the host's files."""

import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from magistral_jax.verify.code_compile import CompileError, Compiler, with_header_first
from magistral_jax.verify.code_folders import BinaryCache, claimed_folder
from magistral_jax.verify.config import CodeConfig
from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Limits, Mechanism

MECHANISMS = [Mechanism.BUBBLEWRAP, Mechanism.LANDLOCK]


@pytest.fixture
def scratch() -> Iterator[pathlib.Path]:
    with claimed_folder() as folder:
        (folder / "scratch").mkdir()
        yield folder / "scratch"


@pytest.fixture(params=MECHANISMS, ids=lambda it: it.value)
def compiler(request: pytest.FixtureRequest, scratch: pathlib.Path, no_cache: None) -> Iterator[Compiler]:
    with Compiler(request.param, CodeConfig(), scratch=scratch) as compiler:
        yield compiler


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch):
    """Everything is compiled."""
    monkeypatch.setattr(BinaryCache, "get", lambda self, key: None)
    monkeypatch.setattr(BinaryCache, "put", lambda self, key, binary: None)


def run(binary: bytes, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """These binaries are harmless, so they may run outside."""
    path = folder / "binary"
    path.write_bytes(binary)
    path.chmod(0o755)
    return subprocess.run([str(path)], capture_output=True, text=True, check=False)


def test_a_program_is_compiled_and_nothing_is_left(compiler: Compiler, scratch: pathlib.Path, tmp_path: pathlib.Path):
    source = '#include <bits/stdc++.h>\nint main() { std::cout << "é " << __cplusplus; return 7; }\n'
    done = run(compiler.compile(source), tmp_path)
    assert (done.stdout, done.returncode) == ("é 202002", 7)
    with pytest.raises(CompileError):
        compiler.compile("int main( {")
    assert list(scratch.iterdir()) == []


def test_a_companion_stands_around_main(compiler: Compiler, tmp_path: pathlib.Path):
    companion = (
        '#include <cstdio>\nextern "C" int __real_main();\n'
        'extern "C" int __wrap_main() { int code = __real_main(); puts("after"); return code; }\n'
    )
    done = run(compiler.compile('#include <cstdio>\nint main() { puts("main"); }', companion), tmp_path)
    assert done.stdout == "main\nafter\n"


@pytest.mark.parametrize(
    ("before", "is_moved"),
    [
        ("", False),
        ("#include <assert.h>\n", True),
        ("// words\n\n  # include<iostream> // words\n#include <ext/pb_ds/assoc_container.hpp>\n", True),
        ("#define LOCAL\n", False),
        ('#include "own.h"\n', False),
        ("int x;\n", False),
        ("#pragma GCC optimize(3)\n", False),
    ],
)
def test_the_whole_library_comes_first_where_that_means_the_same(before: str, is_moved: bool):
    source = f"{before}#include <bits/stdc++.h>\nint main() {{}}\n"
    expected = f"#include <bits/stdc++.h>\n#line 1\n{source}" if is_moved else source
    assert with_header_first(source) == expected
    assert with_header_first("#include <vector>\nint main() {}\n") == "#include <vector>\nint main() {}\n"


def test_errors_keep_their_line_numbers(compiler: Compiler):
    with pytest.raises(CompileError, match=r":3:14: error: 'x' was not declared"):
        compiler.compile("#include <assert.h>\n#include <bits/stdc++.h>\nint main() { x; }\n")


SECRET = "the-secret-of-the-host"
HOSTILE = [
    '#include "{secret}"\nint main() {{}}\n',
    '#include "{scratch}/../secret"\nint main() {{}}\n',
    '#include "/etc/passwd"\nint main() {{}}\n',
    '#include "/proc/self/environ"\nint main() {{}}\n',
    '#include "/dev/random"\nint main() {{}}\n',
    'asm(".incbin \\"{secret}\\"");\nint main() {{}}\n',
    'asm(".incbin \\"/etc/passwd\\"");\nint main() {{}}\n',
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_files_of_the_host_are_not_there(hostile: str, compiler: Compiler, scratch: pathlib.Path):
    secret = scratch.parent / "secret"
    secret.write_text(f"{SECRET}\n")
    with pytest.raises(CompileError) as refusal:
        compiler.compile(hostile.format(secret=secret, scratch=scratch))
    assert refusal.value.path == "compile_error"
    assert SECRET not in refusal.value.message
    assert "root:" not in refusal.value.message


BOMBS = {
    "templates": "template <int n, int m> struct T { T<n - 1, m> a; T<n - 1, m + (1 << n)> b; };\n"
    "template <int m> struct T<0, m> {};\nT<25, 0> t;\nint main() {}\n",
    "array": "int a[1 << 29] = {1};\nint main() {}\n",
    "zeros": 'asm(".zero 8000000000");\nint main() {}\n',
    "macros": "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(A(x))))\nint main() { B(B(int i;)) }\n",
    "errors": "int main() { " + "x; " * 100_000 + "}\n",
    "self": "#include __FILE__\n#include __FILE__\nint main() {}\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str, scratch: pathlib.Path, no_cache: None):
    config = CodeConfig(compile_seconds=2.0)
    with Compiler(Mechanism.LANDLOCK, config, scratch=scratch) as compiler:
        with pytest.raises(CompileError) as refusal:
            compiler.compile(BOMBS[name])
        assert (name == "templates") == (refusal.value.path == "compile_timeout")
        assert len(refusal.value.message) < 10_000
        assert compiler.compile("int main() {}"), "the box goes on"
        assert list(scratch.iterdir()) == []


def test_binaries_are_kept_by_content(monkeypatch: pytest.MonkeyPatch, scratch: pathlib.Path, tmp_path: pathlib.Path):
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(BinaryCache, "get", lambda self, key: kept.get(key))
    monkeypatch.setattr(BinaryCache, "put", lambda self, key, binary: kept.update({key: binary}))
    runs: list[object] = []
    box_run = Box.run

    def count(self: Box, argv: list[str], *, stdin: bytes, limits: Limits, cwd: str, environment: dict[str, str]):
        runs.append(argv)
        return box_run(self, argv, stdin=stdin, limits=limits, cwd=cwd, environment=environment)

    monkeypatch.setattr(Box, "run", count)
    with Compiler(Mechanism.LANDLOCK, CodeConfig(), scratch=scratch) as compiler:
        first = compiler.compile("int main() { return 1; }")
        assert compiler.compile("int main() { return 1; }") == first
        assert len(runs) == 1
        assert run(compiler.compile("int main() { return 2; }"), tmp_path).returncode == 2
        for _ in range(2):  # failures are not kept
            with pytest.raises(CompileError):
                compiler.compile("int main() { return x; }")
        companion = 'extern "C" int __wrap_main() { return 3; }'
        assert run(compiler.compile("int main() { return 1; }", companion), tmp_path).returncode == 3
        assert len(runs) == 5
    assert len(kept) == 3
    assert os.stat(scratch.parent).st_uid == os.geteuid()
