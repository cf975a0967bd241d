"""Ports of this machine for what a person looks at in a browser: always on the loopback interface."""

import ipaddress
import os
import socket
from collections.abc import MutableMapping

from clear.errors import ClearError

HOST = "127.0.0.1"
_LOOPBACK = ("localhost", HOST, "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def spare_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let no proxy named in `environment` take requests to this machine: no proxy can answer them.

    Adds the loopback hosts to NO_PROXY, in both spellings, because clients disagree about which one counts; called
    first in every program, so that its children inherit it. Without a proxy nothing changes: on macOS the variable
    alone would hide the system's own proxies. `[::1]` becomes `::1`: httpx ends with a trace over brackets in NO_PROXY.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return
    listed = f"{environment.get('no_proxy', '')},{environment.get('NO_PROXY', '')}".split(",")
    hosts = dict.fromkeys([*filter(None, (host.strip().strip("[]") for host in listed)), *_LOOPBACK])
    environment["no_proxy"] = environment["NO_PROXY"] = "*" if "*" in hosts else ",".join(hosts)


def is_loopback(host: str) -> bool:
    """Whether a host (a name, or an address, which may be in brackets) is this machine to itself and to nobody else."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_free(port: int, remedy: str) -> None:
    """Raise ClearError with `remedy`, how to name another one, if something listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ClearError(f"port {port} is taken; name another one{remedy}.") from error
