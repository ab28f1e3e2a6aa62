"""A hub on the loopback: as much of its HTTP interface as downloading a model or a data set by id takes."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files by name, at one commit that main points to. gated: everybody sees the list, nobody gets a file.

    sizes: of files that are longer than what is there of them: only ranges of that can be had.
    """

    files: dict[str, bytes]
    gated: bool = False
    kind: str = "models"
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path, *, gated: bool = False) -> Repository:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, gated)


@dataclass
class FakeHub:
    """Serves repositories while used as a context manager. requests: every method and path that was asked for."""

    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: tuple[str, ...] = ()  # ids that are answered with status 500
    ranges: bool = True  # whether parts of files can be asked for
    sent_bytes: int = 0
    tokens: list[str | None] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                hub._answer(self, body=True, posted=self.rfile.read(size))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, handler: BaseHTTPRequestHandler, *, body: bool, posted: bytes = b"") -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path))
        self.tokens.append(handler.headers.get("Authorization"))
        status, headers, content = self._find(path, posted, signed_in="Authorization" in handler.headers)
        asked = handler.headers.get("Range", "")
        if asked and status == 200 and self.ranges:
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            total = int(headers.get("Content-Length", len(content)))
            content = content[first : last + 1]
            status = 206
            headers |= {"Content-Range": f"bytes {first}-{first + len(content) - 1}/{total}"}
            headers |= {"Content-Length": str(len(content))}
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if body:
            self.sent_bytes += len(content)
            handler.wfile.write(content)

    def _find(self, path: str, posted: bytes, *, signed_in: bool) -> tuple[int, dict[str, str], bytes]:
        words = path.strip("/").split("/")
        is_api = words[0] == "api"
        words = words[1:] if is_api else words
        kind = words.pop(0) if words and words[0] in ("models", "datasets") else "models"
        name, rest = "/".join(words[:2]), words[2:]
        if name in self.broken:
            return 500, {}, b"broken"
        repository = self.repositories.get(name)
        if repository is None or repository.kind != kind:
            # the real one answers 401 to who is not signed in, for what is private and for what is not there alike
            status = 404 if signed_in else 401
            return status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        if is_api:
            return 200, {"Content-Type": "application/json"}, self._api(name, repository, rest, posted)
        return self._file(repository, "/".join(rest[2:]))

    def _api(self, name: str, repository: Repository, rest: list[str], posted: bytes) -> bytes:
        listing = [
            {
                "type": "file",
                "path": path,
                "size": repository.sizes.get(path, len(content)),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for path, content in repository.files.items()
        ]
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            inside = [entry for entry in listing if str(entry["path"]).startswith(f"{folder}/" if folder else "")]
            return json.dumps(inside).encode()
        if rest[:1] == ["paths-info"]:
            return json.dumps([entry for entry in listing if str(entry["path"]) in posted.decode()]).encode()
        siblings = [{"rfilename": path} for path in repository.files]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}).encode()

    def _file(self, repository: Repository, path: str) -> tuple[int, dict[str, str], bytes]:
        if repository.gated:
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        if path not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        content = repository.files[path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if path in repository.sizes:
            headers["Content-Length"] = str(repository.sizes[path])
        return 200, headers, content
