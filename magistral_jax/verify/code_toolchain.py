"""The C++ compiler, made ready: linker chosen, <bits/stdc++.h> precompiled. In: a compiler's name, out: a Toolchain.

Of the 1.9 s that g++ takes for a typical solution, 1.3 s go into that one header. Precompiled once for each compiler,
it stays in the user's cache. All that is compiled here is our own text, so it needs no sandbox.
"""

import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile

from magistral_jax.records import MagistralError
from magistral_jax.verify.code_folders import cache_folder, locked

FLAGS = (
    "-std=c++20",
    "-O2",
    "-DONLINE_JUDGE",  # many solutions read a file unless this is set
    "-w",
    "-fmax-errors=3",
    "-fno-diagnostics-show-caret",
    "-fdiagnostics-color=never",
)
_HEADER = "bits/stdc++.h"
_UNFINISHED = ".headers-"
_LINKING = (
    # A static program starts in half the time; mold and lld each save 0.1 s where they are installed.
    ("-static", "-fuse-ld=mold"),
    ("-static", "-fuse-ld=lld"),
    ("-static",),
    ("-fuse-ld=mold",),
    ("-fuse-ld=lld",),
)


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A compiler that is ready for solutions."""

    compiler: str
    """Real path."""
    flags: tuple[str, ...]
    headers: pathlib.Path
    """Folder for `-I`: holds bits/stdc++.h and, beside it, the precompiled one, which is what the compiler opens."""
    version: str
    """Changes with everything that binaries depend on beside their source."""
    installation: str
    """Folder of a compiler that is not the system's own, or empty."""


def prepare_toolchain(name: str) -> Toolchain:
    """Find a compiler and precompile its standard header, unless that was done before.

    Safe to be called by several processes at a time: one compiles, the others wait for it.

    Args:
      name: Of the compiler, or its path.

    Raises:
      MagistralError: There is no such compiler, or it cannot build C++20 programs.
    """
    found = shutil.which(name)
    if found is None:
        raise MagistralError(
            f"code.compiler: no C++ compiler {name!r} on this machine; install one (Debian, Ubuntu: apt install g++)"
        )
    compiler = os.path.realpath(found)
    banner = _run([compiler, "--version"])
    if "Free Software Foundation" not in banner:
        raise MagistralError(f"code.compiler: {found} is not GCC; expected g++ (Debian, Ubuntu: apt install g++)")
    linkers = [linker for linker in ("mold", "ld.lld") if shutil.which(linker)]
    version = repr((compiler, banner, platform.libc_ver(), FLAGS, linkers))
    cache = cache_folder()
    folder = cache / f"headers-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    with locked(cache / "headers.lock"):
        if not folder.exists():
            for abandoned in cache.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            _build(compiler, folder)
    linking = (folder / "linking").read_text().split()
    return Toolchain(compiler, (*FLAGS, *linking), folder, version, _installation(compiler))


def _installation(compiler: str) -> str:
    """Folder that a compiler was installed to, empty for the system's.

    Raises:
      MagistralError: It was installed to a folder that also holds other things, which programs must not see.
    """
    if compiler.startswith("/usr/"):
        return ""
    libraries = os.path.realpath(_run([compiler, "-print-search-dirs"]).split("\n")[0].removeprefix("install: "))
    folder = re.split(r"/lib\w*/gcc/", libraries)[0]
    if folder in ("", os.path.expanduser("~")) or not compiler.startswith(f"{folder}/"):
        raise MagistralError(
            f"code.compiler: {compiler} must be confined with the folder that it is installed in, and there is no such "
            "folder of its own; use one that is installed in /usr, or in a folder that holds nothing else"
        )
    return folder


def _build(compiler: str, folder: pathlib.Path) -> None:
    """Precompile into a folder that appears at once or not at all."""
    includes = _run([compiler, *FLAGS, "-M", "-x", "c++", "-"], f"#include <{_HEADER}>\n")
    source = next((word for word in includes.split() if word.endswith(_HEADER)), None)
    if source is None:
        raise MagistralError(f"code.compiler: {compiler} has no header <{_HEADER}>; expected GCC's own C++ library")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_UNFINISHED) as scratch:
        built = pathlib.Path(scratch) / "built"
        header = built / _HEADER
        header.parent.mkdir(parents=True)
        # Beside the precompiled header lies its text: a second #include of it is looked up anew.
        shutil.copyfile(source, header)
        _run([compiler, *FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
        (built / "linking").write_text(" ".join(_choose_linking(compiler, scratch)))
        for path in (built, *built.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        built.rename(folder)


def _choose_linking(compiler: str, scratch: str) -> tuple[str, ...]:
    """The first flags that link a program here: static libraries and other linkers may not be installed."""
    command = [compiler, *FLAGS, "-x", "c++", "-", "-o", f"{scratch}/probe"]
    for flags in _LINKING:
        linked = subprocess.run([*command, *flags], input=b"int main() {}", capture_output=True, check=False)
        if linked.returncode == 0:
            return flags
    _run(command, "int main() {}")
    return ()


def _run(command: list[str], text: str = "") -> str:
    """Standard output of the compiler."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False, env=environment)
    if done.returncode != 0:
        first_line = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise MagistralError(f"code.compiler: {command[0]} cannot build C++20 programs: {first_line}")
    return done.stdout
