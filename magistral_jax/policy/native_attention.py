"""The CPU kernel: attention to KV pages in C++, called by XLA through jax's foreign functions.

XLA for CPUs cannot read pages where they lie: it gathers them first, in many small kernels, which takes 2.5 times as
long and more (docs/kernels.md). The source is compiled when it is first needed, for this very processor, and kept in
the user's cache: `magistral_jax` in $XDG_CACHE_HOME or ~/.cache.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from magistral_jax.records import MagistralError

_SOURCES = [pathlib.Path(__file__).with_name(name) for name in ("native_attention.cc", "native_vectors.h")]
_TARGET = "magistral_paged_attention"  # its name in the source, and for XLA
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", "-w"]
_LANES = 16  # of the kernel's vectors
_LOCK = threading.Lock()  # two engines of one process compile and register once


def why_no_native_pages(platform: str, head_dim: int, kv_dtype: str) -> str:
    """Why the kernel cannot be used, as the end of a sentence; "" where it can. Compiles it where that was not done.

    Args:
      platform: Of the engine's devices.
      head_dim: Of the model.
      kv_dtype: Precision of the pages.
    """
    if platform != "cpu":
        return f"the engine runs on {platform}"
    if head_dim % _LANES:
        return f"its kernel wants heads of a multiple of {_LANES} dimensions, and the model's have {head_dim}"
    if kv_dtype not in ("float32", "bfloat16"):
        return f"its kernel reads float32 and bfloat16, and `generation.kv_dtype` is `{kv_dtype}`"
    with _LOCK:
        return _register()


def native_paged_attention(
    q: Float[Array, "B T H E"],
    keys: Num[Array, "P K C E"],
    values: Num[Array, "P K C E"],
    page_table: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    is_live: Bool[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T H E"]:
    """`paged_attention`, with the same arguments, over pages of float32 or bfloat16; queries not live give zeros.

    Raises:
      MagistralError: The kernel cannot be compiled here.
    """
    with _LOCK:
        if obstacle := _register():
            raise MagistralError(f"`generation.attention` is `native`, but {obstacle}.")
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    whole = (page_table.astype(jnp.int32), positions.astype(jnp.int32), is_live)
    return call(q.astype(jnp.float32), keys, values, *whole, window=np.int64(window or 0)).astype(q.dtype)


@functools.cache
def _register() -> str:
    """Make the kernel known to XLA; answers why it cannot be."""
    try:
        library = ctypes.CDLL(str(build(os.environ.get("CXX") or "c++")))
    except (MagistralError, OSError) as error:
        return str(error)
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library[_TARGET]), platform="cpu")
    return ""


def build(compiler: str) -> pathlib.Path:
    """The library for these sources, this compiler and this processor; appears at once or not at all.

    Raises:
      MagistralError: There is no such compiler, or it cannot compile the kernel.
      OSError: The cache cannot be written.
    """
    if shutil.which(compiler) is None:
        raise MagistralError(f"there is no C++ compiler `{compiler}` (Debian, Ubuntu: apt install g++)")
    # What a compiler predefines names its version and all that the processor can do.
    facts = _run([compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    made_of = (*(source.read_bytes() for source in _SOURCES), jax.__version__, *_FLAGS, facts)
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "magistral_jax"
    path = folder / f"paged_attention-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = pathlib.Path(scratch) / path.name
            _run([compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), str(_SOURCES[0]), "-o", str(new)])
            new.replace(path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), f"it ended with {done.returncode}")
        raise MagistralError(f"`{command[0]}` does not compile it (C++20 is needed): {reason}")
    return done.stdout
