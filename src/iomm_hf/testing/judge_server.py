"""A judge on 127.0.0.1 that speaks the OpenAI protocol's chat completions, and fails in every way that a real one does.

Tests use the real client against it. `respond` answers; `fail_next` makes the next requests fail first: a status, a body that is no
JSON, JSON that is no completion, a question that a filter turns down, or a connection cut half-way.
"""

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from .local_server import LocalServer


Reply = str | Mapping[str, Any]  # the answer's text, or fields of the choice: `content`, `refusal`, `finish_reason`


class LocalJudge(LocalServer):
    """
    A server in a background thread while the context is open.

    Args:
        respond (`Callable[[dict], str | dict]`): From a request's body to the answer's text, or to `content`, `refusal` and
            `finish_reason`.
        model (`str`, *optional*, defaults to `"local-judge-1"`): The name that it answers under; any other is unknown to it.
        key (`str`, *optional*): The key that it wants. By default any.

    Example:

    ```python
    >>> from iomm_hf.evaluation.judges import EndpointJudge, Question
    >>> from iomm_hf.evaluation.wording import Message
    >>> with LocalJudge(lambda request: "yes") as server:
    ...     judge = EndpointJudge("local-judge-1", server.address)
    ...     [answer] = judge.ask([Question("a", [Message("user", "Is it?")], [])])
    >>> answer.status, answer.text, answer.model
    ('answered', 'yes', 'local-judge-1')
    ```
    """

    def __init__(
        self, respond: Callable[[dict[str, Any]], Reply], model: str = "local-judge-1", key: str | None = None
    ):
        self.respond, self.model, self.key = respond, model, key
        self.requests: list[dict[str, Any]] = []  # bodies, in order of arrival, failed ones too
        self.headers: list[dict[str, str]] = []  # with lower-case names
        self._failures: list[int | str] = []
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def handle(self, *connection: Any) -> BaseHTTPRequestHandler:
        return _Handler(self, *connection)

    def fail_next(self, *kinds: int | str):
        """
        Lets the next requests fail, one each.

        Args:
            kinds (`int | str`): A status such as 429 or 500, "garbage" (no JSON), "other" (JSON that is no completion), "filtered"
                (a status of 400, as some servers refuse a question) or "cut".
        """
        with self._lock:
            self._failures += kinds

    def take(self, body: dict[str, Any], headers: Mapping[str, str]) -> int | str | None:
        """Notes a request, and says whether and how it is to fail."""
        with self._lock:
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            return self._failures.pop(0) if self._failures else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, judge: LocalJudge, *args: Any):
        self.judge = judge
        super().__init__(*args)

    def log_message(self, format: str, *args: Any):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        failure = self.judge.take(body, self.headers)
        if self.path != "/v1/chat/completions":
            return self.send(404, {"error": {"message": f"no {self.path}", "code": "not_found"}})
        if self.judge.key is not None and self.headers["Authorization"] != f"Bearer {self.judge.key}":
            return self.send(401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
        if body["model"] != self.judge.model:
            return self.send(404, {"error": {"message": f"no model {body['model']}", "code": "model_not_found"}})
        if failure == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": "half')
            self.close_connection = True
            return None
        if failure == "garbage":
            return self.send(200, b"<html>Bad gateway</html>")
        if failure == "other":
            return self.send(200, {"object": "chat.completion", "choices": []})
        if failure == "filtered":
            return self.send(400, {"error": {"message": "the filter has this", "code": "content_filter"}})
        if failure is not None:
            return self.send(int(failure), {"error": {"message": f"status {failure}", "code": str(failure)}})
        reply = self.judge.respond(body)
        fields = {"content": reply} if isinstance(reply, str) else dict(reply)
        finish = fields.pop("finish_reason", "stop")
        return self.send(
            200,
            {
                "id": f"local-{len(self.judge.requests)}",
                "object": "chat.completion",
                "created": 0,
                "model": self.judge.model,
                "choices": [
                    {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": None, **fields}}
                ],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            },
        )

    def send(self, status: int, content: bytes | dict[str, Any]):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if isinstance(content, dict) else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")  # the client then waits no longer
        self.end_headers()
        self.wfile.write(data)
