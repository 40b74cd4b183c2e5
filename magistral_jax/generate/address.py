"""Network addresses as users write them: `HOST:PORT`, `[IPv6]:PORT`. Imports no jax: the configuration checks them."""

import ipaddress

from magistral_jax.records import MagistralError


def parse_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
      MagistralError: It is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise MagistralError(f"`{address}` is no address; expected HOST:PORT.")
    return host.strip("[]"), int(port)


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this host reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of this host."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
