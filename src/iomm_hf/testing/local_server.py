"""What the servers of tests share: they answer on 127.0.0.1, on a free port, while their context is open."""

import threading
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class LocalServer(ABC):
    """A server in a background thread. Those that derive from it say what answers a request."""

    port: int  # from the moment that the context is entered

    @abstractmethod
    def handle(self, *connection: Any) -> BaseHTTPRequestHandler:
        """Answers one connection, given what `http.server` gives its handlers."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handle)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
