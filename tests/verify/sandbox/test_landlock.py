"""File rules, each in a process of its own."""

import subprocess
import sys

import pytest

from magistral_jax.verify.sandbox import landlock

RESTRICTED = """
import os, socket, sys
from magistral_jax.verify.sandbox import landlock
folder = sys.argv[1]
landlock.restrict(readable=[folder + "/readable", folder + "/file"], writable=[folder + "/writable"])
os.chdir(folder)
"""


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("open('readable/file').read()", None),
        ("os.listdir('readable')", None),
        ("open('file').read()", None),
        ("open('writable/new', 'w').write('x')", None),
        ("os.rename('writable/file', 'writable/other')", None),
        ("os.mkdir('writable/folder')", None),
        ("os.unlink('writable/file')", None),
        ("os.truncate('writable/file', 0)", None),
        ("open('readable/new', 'w')", "PermissionError"),
        ("open('readable/file', 'r+')", "PermissionError"),
        ("os.truncate('readable/file', 0)", "PermissionError"),
        ("os.unlink('readable/file')", "PermissionError"),
        ("os.link('readable/file', 'writable/link')", "OSError"),
        ("open('file', 'w')", "PermissionError"),
        ("open('closed/file')", "PermissionError"),
        ("os.listdir('closed')", "PermissionError"),
        ("open('writable/../closed/file')", "PermissionError"),
        ("open('readable/link')", "PermissionError"),
        ("os.mkfifo('closed/fifo')", "PermissionError"),
        ("os.symlink('x', 'closed/symlink')", "PermissionError"),
        ("open('/etc/passwd')", "PermissionError"),
        ("socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    ],
)
def test_rules(action, error, tmp_path):
    for name in ("readable", "writable", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "readable" / "link").symlink_to("../closed/file")
    ended = subprocess.run(
        [sys.executable, "-c", RESTRICTED + action, str(tmp_path)], capture_output=True, text=True, check=False
    )
    last_line = ended.stderr.strip().rpartition("\n")[2]
    assert (ended.returncode, last_line.partition(":")[0]) == ((0, "") if error is None else (1, error)), last_line


def test_a_path_that_is_missing_is_an_error():
    with pytest.raises(FileNotFoundError):
        landlock.restrict(readable=["/missing"], writable=[])


def test_this_kernel_has_it():
    assert landlock.is_available()
    assert landlock.abi() >= 1
