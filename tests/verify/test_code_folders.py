"""Folders that outlive processes: nobody else's are used, killed owners leave nothing behind, caches stay small."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import tempfile
from concurrent import futures

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_jax.records import MagistralError
from magistral_jax.verify.code_folders import BinaryCache, cache_folder, claimed_folder, locked, make_own_folder


@pytest.fixture(autouse=True)
def own_places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Other processes' folders are out of the way. The cache's parent may be entered by everyone."""
    with tempfile.TemporaryDirectory() as place:
        pathlib.Path(place).chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        yield


# --- places ----------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_user_says():
    folder = cache_folder()
    assert folder == pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "magistral_jax"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert cache_folder() == folder


def test_the_cache_is_in_the_users_home_or_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    made: list[pathlib.Path] = []
    monkeypatch.setattr("magistral_jax.verify.code_folders.make_own_folder", made.append)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache_folder() == tmp_path / ".cache" / "magistral_jax" == made[0]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache_folder() == pathlib.Path("/var/cache/magistral_jax")


def test_a_cache_that_confined_programs_cannot_enter(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    closed.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
    monkeypatch.setattr("magistral_jax.verify.code_folders.make_own_folder", lambda folder: folder.mkdir())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(MagistralError, match=r"who cannot enter .*; set XDG_CACHE_HOME to a folder"):
        cache_folder()


def test_somebody_elses_folder_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(MagistralError, match=r"link: expected a folder of the user with id \d+; take it away"):
        make_own_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(MagistralError, match="file: cannot make this folder: File exists"):
        make_own_folder(tmp_path / "file")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(MagistralError, match="expected a folder of the user with id 12345"):
        make_own_folder(tmp_path)


# --- claimed folders -------------------------------------------------------------------------------------------------


def test_claimed_folders_are_apart_and_go_away():
    with claimed_folder() as one, claimed_folder() as two:
        assert one != two
        (one / "file").touch()
        assert not list(two.iterdir())
    assert not one.exists()
    assert not two.exists()
    with claimed_folder() as again:
        assert again == one
        assert not list(again.iterdir())


CLAIM = """
import sys, time
from magistral_jax.verify.code_folders import claimed_folder
with claimed_folder() as folder:
    (folder / "left").touch()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_the_folder_of_a_killed_process_is_taken_over():
    with subprocess.Popen([sys.executable, "-c", CLAIM], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        taken = pathlib.Path(owner.stdout.readline().strip())
        with claimed_folder() as other:
            assert other != taken
        owner.send_signal(signal.SIGKILL)
    assert (taken / "left").exists()
    with claimed_folder() as folder:
        assert folder == taken
        assert not list(folder.iterdir())


def test_a_lock_is_held_by_one(tmp_path: pathlib.Path):
    counter = tmp_path / "counter"
    counter.write_text("0")

    def increment(_: int) -> None:
        with locked(tmp_path / "lock"):
            counter.write_text(str(int(counter.read_text()) + 1))

    with futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(50)))
    assert counter.read_text() == "50"


# --- binaries --------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_what_was_used_last(tmp_path: pathlib.Path):
    cache = BinaryCache(tmp_path / "programs", max_bytes=300)
    for number, key in enumerate("abc"):
        cache.put(key, key.encode() * 100)
        os.utime(tmp_path / "programs" / key, (number, number))
    assert cache.get("a") == b"a" * 100  # from now on the one used last
    cache.put("d", b"d" * 100)
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert sorted(path.name for path in (tmp_path / "programs").iterdir()) == ["a", "c", "d"]


def test_a_binary_is_replaced_whole(tmp_path: pathlib.Path):
    cache = BinaryCache(tmp_path / "programs", max_bytes=10**6)
    with futures.ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(cache.put, "key", bytes([number]) * 10_000) for number in range(40)]
        readers = [pool.submit(cache.get, "key") for _ in range(200)]
    for writer in writers:
        writer.result()
    for reader in readers:
        binary = reader.result()
        assert binary is None or (len(binary) == 10_000 and len(set(binary)) == 1)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60)), max_size=12))
@settings(deadline=None, max_examples=50)
def test_the_cache_is_bounded(puts: list[tuple[str, int]]):
    with tempfile.TemporaryDirectory() as folder:
        cache = BinaryCache(pathlib.Path(folder), max_bytes=100)
        for key, size in puts:
            cache.put(key, b"x" * size)
            assert cache.get(key) == b"x" * size, "what was put last is there"
            assert sum(path.stat().st_size for path in pathlib.Path(folder).iterdir()) <= 100
