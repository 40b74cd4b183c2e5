"""A user of its own for every box, as the kernel counts processes, and lets them be signalled, by user."""

import contextlib
import errno
import socket
from collections.abc import Iterator

from magistral_jax.verify.sandbox import privileges

_FIRST_UID = 64001
_NUM_UIDS = 1024  # boxes that live at one time on a machine


@contextlib.contextmanager
def claimed_user() -> Iterator[int | None]:
    """The id of a user that no other box of this machine has, whichever process made it; None unless root.

    The claim is the name of a socket: the kernel gives it to one process, and takes it back when that one dies.

    Raises:
      OSError: All of them are taken.
    """
    for uid in range(_FIRST_UID, _FIRST_UID + _NUM_UIDS):
        if not privileges.can_become(uid):
            break
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(f"\0magistral-jax-user-{uid}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            yield uid
            return
    else:
        raise OSError(errno.EAGAIN, f"the users {_FIRST_UID} to {_FIRST_UID + _NUM_UIDS - 1} are taken by other boxes")
    yield None
