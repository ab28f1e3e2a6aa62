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


def commit_of(branch: str) -> str:
    """The commit that a branch points to."""
    return COMMIT if branch == "main" else hashlib.sha1(branch.encode()).hexdigest()


@dataclass
class Repository:
    """Files by name, at one commit that main points to; `branches` have files of their own.

    gated: everybody sees the list, only who sends one of `readers` as a token gets a file. private: nobody else sees
    it. sizes: of files that are longer than what is there of them: only ranges of that can be had.
    """

    files: dict[str, bytes]
    gated: bool = False
    kind: str = "models"
    private: bool = False
    readers: tuple[str, ...] = ()
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, or of the commit that it points to; None when there is no such revision."""
        if revision in ("main", COMMIT):
            return self.files
        found = [files for branch, files in self.branches.items() if revision in (branch, commit_of(branch))]
        return found[0] if found else None

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

            def do_PUT(self) -> None:
                self.do_POST()

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
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        status, headers, content = self._find(handler.command, path, posted, token)
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

    def _find(self, method: str, path: str, posted: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        words = path.strip("/").split("/")
        is_api = words[0] == "api"
        words = words[1:] if is_api else words
        kind = words.pop(0) if words and words[0] in ("models", "datasets") else "models"
        name, rest = "/".join(words[:2]), words[2:]
        if name in self.broken:
            return 500, {}, b"broken"
        repository = self.repositories.get(name)
        hidden = repository is not None and repository.private and token not in repository.readers
        if repository is None or repository.kind != kind or hidden:
            # the real one answers 401 to who is not signed in, for what is private and for what is not there alike
            status = 404 if token else 401
            return status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        files = repository.at(rest[1] if len(rest) > 1 else "main")
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        branch = next((name for name, known in repository.branches.items() if known is files), "main")
        if is_api:
            content = self._api(name, repository, files, commit_of(branch), rest, posted)
            return 200, {"Content-Type": "application/json"}, content
        if repository.gated and token not in repository.readers:
            return 403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        path = "/".join(rest[2:])
        return self._file(files, commit_of(branch), path, repository.sizes.get(path))

    def _api(
        self,
        name: str,
        repository: Repository,
        files: dict[str, bytes],
        commit: str,
        rest: list[str],
        posted: bytes,
    ) -> bytes:
        listing = [
            {
                "type": "file",
                "path": path,
                "size": repository.sizes.get(path, len(content)),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for path, content in files.items()
        ]
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            inside = [entry for entry in listing if str(entry["path"]).startswith(f"{folder}/" if folder else "")]
            return json.dumps(inside).encode()
        if rest[:1] == ["paths-info"]:
            return json.dumps([entry for entry in listing if str(entry["path"]) in posted.decode()]).encode()
        siblings = [{"rfilename": path} for path in files]
        answer = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": repository.private}
        return json.dumps(answer).encode()

    def _file(
        self, files: dict[str, bytes], commit: str, path: str, size: int | None
    ) -> tuple[int, dict[str, str], bytes]:
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        if size is not None:
            headers["Content-Length"] = str(size)
        return 200, headers, content
