"""Ports of this machine for what a person looks at in a browser: always on the loopback interface."""

import socket

from clear.errors import ClearError

HOST = "127.0.0.1"


def require_free(port: int, remedy: str) -> None:
    """Raise ClearError with `remedy`, how to name another one, if something listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ClearError(f"port {port} is taken; name another one{remedy}.") from error
