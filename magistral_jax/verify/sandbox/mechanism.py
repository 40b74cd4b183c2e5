"""Which mechanism confines programs on this machine."""

import functools
import logging

from magistral_jax.records import MagistralError
from magistral_jax.verify.sandbox.box import BoxError
from magistral_jax.verify.sandbox.execution import Mechanism
from magistral_jax.verify.sandbox.self_test import self_test

__all__ = ["Mechanism", "SandboxUnavailable", "choose_mechanism"]

_AUTO = "auto"


class SandboxUnavailable(MagistralError):
    """No mechanism that was asked for holds here; names each with its error."""


@functools.cache
def choose_mechanism(wanted: str = _AUTO) -> Mechanism:
    """The mechanism to use, after a self-test of it, once in a process.

    Args:
      wanted: The name of a mechanism; or `auto`: bubblewrap, or else Landlock. Never `unsafe` unless it is named.

    Raises:
      SandboxUnavailable: None holds.
      MagistralError: There is no such mechanism.
    """
    names = [mechanism.value for mechanism in Mechanism]
    if wanted not in (_AUTO, *names):
        raise MagistralError(f"sandbox: mechanism {wanted!r} is none of {', '.join([_AUTO, *names])}")
    if wanted == Mechanism.UNSAFE.value:
        logging.getLogger(__name__).warning("untrusted programs run without a sandbox (mechanism unsafe)")
        return Mechanism.UNSAFE
    candidates = [Mechanism.BUBBLEWRAP, Mechanism.LANDLOCK] if wanted == _AUTO else [Mechanism(wanted)]
    errors = {}
    for mechanism in candidates:
        try:
            self_test(mechanism)
        except (BoxError, MagistralError, OSError) as error:
            errors[mechanism] = str(error)
        else:
            return mechanism
    raise SandboxUnavailable(_explain(errors))


def _explain(errors: dict[Mechanism, str]) -> str:
    found = "; ".join(f"{mechanism.value}: {error}" for mechanism, error in errors.items())
    remedies = {
        Mechanism.BUBBLEWRAP: "install bubblewrap (`apt install bubblewrap`) where user namespaces are allowed",
        Mechanism.LANDLOCK: "use a kernel with Landlock (5.13 or later, enabled at boot)",
    }
    advice = ", or ".join(remedies[mechanism] for mechanism in errors)
    return f"no sandbox for untrusted programs on this machine: {found}. To get one: {advice}"
