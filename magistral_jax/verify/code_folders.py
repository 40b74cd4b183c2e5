"""Folders of code verification: a cache of what can be made again, and scratch space that no killed worker leaks."""

import contextlib
import fcntl
import itertools
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator

from magistral_jax.records import MagistralError

_READ_BY_ALL = 0o755  # programs that root confines run as another user


def cache_folder() -> pathlib.Path:
    """This user's folder for what can be made again; made where it is missing.

    It is `magistral_jax` in $XDG_CACHE_HOME, else in ~/.cache, or for root in /var/cache: what root confines runs as
    another user, who cannot enter root's home.

    Raises:
      MagistralError: The folder cannot be made, or not everyone who has to may enter it.
    """
    is_root = os.geteuid() == 0
    own = "/var/cache" if is_root else os.path.expanduser("~/.cache")
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or own) / "magistral_jax"
    make_own_folder(folder)
    closed = [parent for parent in folder.resolve().parents if is_root and not parent.stat().st_mode & stat.S_IXOTH]
    if closed:
        raise MagistralError(
            f"{folder}: confined programs run as another user, who cannot enter {closed[-1]}; "
            "set XDG_CACHE_HOME to a folder that every user can enter"
        )
    return folder


def make_own_folder(folder: pathlib.Path) -> None:
    """Make a folder that everyone may read and only this user may change.

    Raises:
      MagistralError: It cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise MagistralError(f"{folder}: expected a folder of the user with id {os.geteuid()}; take it away")
        folder.chmod(_READ_BY_ALL)
    except OSError as error:
        raise MagistralError(f"{folder}: cannot make this folder: {error.strerror}") from error


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a file, made where it is missing; waits for other processes. A killed process holds none."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed_folder() -> Iterator[pathlib.Path]:
    """An empty folder of this process alone.

    The first one that no living process holds is taken over, so that killed workers leave no more folders behind than
    there ever were at one time.
    """
    place = pathlib.Path(tempfile.gettempdir()) / f"magistral-jax-{os.geteuid()}"
    make_own_folder(place)
    for number in itertools.count():
        with (place / f"{number}.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            folder = place / str(number)
            shutil.rmtree(folder, ignore_errors=True)
            make_own_folder(folder)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


class BinaryCache:
    """Compiled programs by the hash of what they were made from, shared by all processes of a user.

    Bounded: the ones that were not used for longest give way. Losing one to another process is a miss, not an error.
    """

    def __init__(self, folder: pathlib.Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        make_own_folder(folder)

    def get(self, key: str) -> bytes | None:
        """The binary of a key, or None."""
        path = self._folder / key
        try:
            binary = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return binary

    def put(self, key: str, binary: bytes) -> None:
        """Keep a binary."""
        partial = self._folder / f".{key}.{secrets.token_hex(8)}"
        partial.write_bytes(binary)
        partial.replace(self._folder / key)
        self._evict()

    def _evict(self) -> None:
        found: list[tuple[float, int, pathlib.Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
