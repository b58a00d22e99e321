"""uvicorn with our application, in a thread of its own: started, asked, drained.

Serve's own proxy would hold a body that its replica does not read, however long, and sees neither our limits nor our
streams: so this is the server, and calls go on from it to the engines. Knows no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import uvicorn

from pipeline.errors import ConfigError
from serve_app.app import Server
from serve_app.connection import connections

UNREAD_MS = 60_000  # an answer that a client takes nothing of for so long: its connection is cut
IDLE_S = 75  # of a connection between two requests


class HttpServer:
    """One application on one port."""

    def __init__(self, server: Server, host: str, port: int, drain_s: float) -> None:
        self.app = server.app
        self._server, self._drain_s = server, drain_s
        self._socket = _listening(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            server.asgi,
            # h11, strict about what a request is: two lengths, or a bad one, end the connection
            http=connections(server.asgi.turn_away),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nobody's address is looked at
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the door tells what there is to tell
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Returns when it listens. Raises what its lifespan raised."""
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise self.app.failure or ConfigError("the HTTP server did not start") from self._failure
            time.sleep(0.01)

    def drain(self) -> None:
        """Not ready and taking nothing new; returns when what runs has ended, or `drain_s` are over."""
        self._server.drain()
        self._uvicorn.should_exit = True
        self._thread.join(self._drain_s + 10)

    def _run(self) -> None:
        try:
            with contextlib.closing(self._socket):
                self._uvicorn.run(sockets=[self._socket])
        except BaseException as error:
            self._failure = error


def _listening(host: str, port: int) -> socket.socket:
    """Raises `ConfigError` where it cannot listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host}: {error.strerror or error}") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by every connection
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigError(f"port {port} on {host}: {error.strerror or error}") from None
    return listening
