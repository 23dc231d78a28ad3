"""A small HTTP server that answers like the model hub, over a folder `owner/name/files`.

Speaks what a snapshot download asks for: repository info, the file tree, HEAD and GET of files (with ranges, so that a
cut download resumes). Counts requests per file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["HubServer", "hub_server"]

SHA = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves the repositories under `root`. `gets` counts file downloads by name; `inflate` lies about sizes,
    `gated` repositories and `broken` files are refused."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.gets: Counter[str] = Counter()
        self.inflate: dict[str, int] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()

    @property
    def url(self) -> str:
        """Base address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """Run a hub in a thread for the time of a block."""
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner_name = "/".join(parts[2:4] if api else parts[:2])
        repo = self.server.root / owner_name
        if not repo.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body)
        elif owner_name in self.server.gated and not api:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body)
        elif api and "tree" in parts:
            self._send(200, json.dumps(self._tree(repo)).encode(), {}, body)
        elif api:
            siblings = [{"rfilename": entry["path"]} for entry in self._tree(repo)]
            info = {"_id": "1", "id": owner_name, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            self._send(200, json.dumps(info).encode(), {}, body)
        else:
            self._file(repo, "/".join(parts[4:]), body)

    def _tree(self, repo: Path) -> list[dict[str, object]]:
        files = sorted(p for p in repo.rglob("*") if p.is_file())
        names = [str(p.relative_to(repo)) for p in files]
        return [
            {"type": "file", "path": n, "size": self.server.inflate.get(n, p.stat().st_size), "oid": _digest(p)}
            for n, p in zip(names, files, strict=True)
        ]

    def _file(self, repo: Path, name: str, body: bool) -> None:
        path = repo / name
        if name in self.server.broken:
            self._send(403, b"{}", {}, body)
            return
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, body)
            return
        if body:
            self.server.gets[name] += 1
        data = path.read_bytes()
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            last = min(int(end) if end else len(data) - 1, len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            self._send(206, data[int(start) : last + 1], headers, body)
        else:
            self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
