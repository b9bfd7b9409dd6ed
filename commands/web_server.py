"""Web applications of this package, from the socket to the signal that ends them."""

import contextlib
import socket
from typing import Any

import uvicorn

from .. import stopping


def web_server(app: Any, **settings: Any) -> uvicorn.Server:
    """uvicorn's server of an application, ended by this package's own handling of signals.

    Args:
        app: The web application.
        settings: Further settings of uvicorn, such as limits.
    """
    serving = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, ws="none", **settings))
    # uvicorn would raise signals anew at the end, and knows nothing of SIGHUP
    serving.capture_signals = contextlib.nullcontext
    return serving


def serve_until_signal(serving: uvicorn.Server, host: str, port: int, said: str = "") -> None:
    """Serve until a signal asks to end; requests that run then have as long as the server's settings give them.

    Args:
        serving: What :func:`web_server` returned.
        host: Address to listen at.
        port: Port to listen at.
        said: Line that is printed once the port is this server's; empty for none.

    Raises:
        OSError: Another program listens at the port; uvicorn would end with an exit status of its own.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:

        def end() -> None:
            serving.should_exit = True

        if said:
            print(said, flush=True)
        with stopping.deferred(end):
            serving.run(sockets=[listening])
