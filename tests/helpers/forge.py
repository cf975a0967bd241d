"""A forge with the pull requests of one repository."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Forge(ThreadingHTTPServer):
    """The pull requests of one repository, as GitHub's REST interface shows them."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.refuse = 0
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        assert path == "/repos/team/clear/pulls" and "state=all" in query
        found = [one for one in self.server.requests if f"head=team%3A{one['head'].replace('/', '%2F')}" in query]
        self._say(200, [{"html_url": one["html_url"]} for one in found])

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refuse:
            return self._say(self.server.refuse, {"message": "Resource not accessible"})
        content["html_url"] = f"{self.server.url}/team/clear/pull/{len(self.server.requests) + 1}"
        self.server.requests.append(content)
        return self._say(201, {"html_url": content["html_url"]})

    def _say(self, status: int, content: object) -> None:
        if self.headers["Authorization"] != "Bearer t0ken":
            status, content = 401, {"message": "Bad credentials"}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None: ...
