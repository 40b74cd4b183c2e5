"""The same boxes and the same attacks as an unprivileged user: programs then stay the user that the runner is."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[2]


def test_boxes_and_attacks_as_nobody():
    files = [str(HERE / name) for name in ("test_box.py", "test_attacks.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    if os.geteuid() != 0:
        return  # this is the run as an unprivileged user, and those files are part of it
    ended = subprocess.run([*as_nobody(), *command], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert ended.returncode == 0, ended.stdout[-10_000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout


def as_nobody():
    """A command that runs another as user nobody, who can get to the repository and to Python wherever these are."""
    needed = [REPOSITORY, pathlib.Path(sys.prefix), pathlib.Path(sys.base_prefix)]
    words = ["bwrap", "--dev-bind", "/", "/"]
    closed = {parent for path in needed for parent in path.parents if not parent.stat().st_mode & 0o001}
    tops = [folder for folder in sorted(closed) if not closed & set(folder.parents)]
    for top in tops:
        words += ["--perms", "0755", "--tmpfs", str(top)]
    for path in dict.fromkeys(needed):
        hidden = [parent for parent in reversed(path.parents) if any(top in parent.parents for top in tops)]
        for parent in hidden:
            words += ["--perms", "0755", "--dir", str(parent)]
        if any(top in path.parents for top in tops):
            words += ["--ro-bind", str(path), str(path)]
    return [*words, "--", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
