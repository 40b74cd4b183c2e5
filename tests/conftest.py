"""Test set-up: 8 simulated CPU devices, strict dtype and rank promotion, a compile cache kept between runs."""

import os
import pathlib
import shutil
import signal

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

# Most of the tests' time is XLA compiling for CPUs what then runs once or twice. Without LLVM's optimizations and the
# newer fusion emitters a training step compiles in an eighth of the CPU seconds. XLA aborts at a flag that it does not
# know, so only a version that is known to know these gets them.
if jax.__version_info__[:2] == (0, 10):
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# In the background of a shell Ctrl-C is ignored, and so it would be in all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SYSTEM_PROGRAMS = {"bwrap": "bubblewrap", "g++": "g++"}


def pytest_sessionstart(session: pytest.Session):
    """Look first for what the tests need from the system, rather than fail in a hundred places."""
    missing = [package for program, package in SYSTEM_PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        pytest.exit(f"the tests need {' and '.join(missing)}: apt install {' '.join(missing)}", returncode=2)
