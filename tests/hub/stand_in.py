"""A local replacement of the Hub: the HTTP interface that huggingface_hub, transformers and datasets use, for repositories of a test.

    hub = Hub(folder); hub.start()
    commit = hub.publish("model", "org/name", files)      # {path: bytes}, or a folder; ``revision`` is a branch or a tag
    hub.tokens["secret"] = {"org"}                        # a token, and the owners in whose name it may write
    environment = hub.environment(cache, token="secret")  # for the process of a client
    hub.stop()

Uploads use the protocol of huggingface_hub without Xet: the repository is created, large files are sent by LFS, and one request commits
all files. Weights of any size are large files here.
As on the real Hub, a commit can be read by its hash after its branch has moved. Attributes turn on faults: ``gated``, ``slow_seconds``,
``cut_after``, ``failures``, ``is_down``. ``requests`` lists all requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?")
FILE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
UPLOAD = re.compile(
    r"/lfs/[0-9a-f]{64}|/api/validate-yaml|/api/repos/create|/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+"
    r"|/([^/]+/[^/]+)\.git/info/lfs/objects/batch"
)
WHAT = ("revision", "tree", "paths-info", "refs")


@dataclass
class Repository:
    """The commits of one repository (path -> content of each) and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """Repositories, and the faults of the server."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)  # by kind (model, dataset) and id
    redirects: dict[str, str] = field(default_factory=dict)  # old id -> new id
    gated: set[str] = field(default_factory=set)  # ids whose files are refused; their metadata are public
    slow_seconds: float = 0.0  # before each answer
    cut_after: int | None = None  # number of bytes after which a download breaks off, ...
    cuts: int = 0  # ... this many times
    failures: int = 0  # number of requests that get status 503
    is_down: bool = False  # connections are closed without an answer
    tokens: dict[str, set[str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)  # ids that only tokens of their owner can see
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    messages: list[str] = field(default_factory=list)  # of the commits
    moves_on: bool = False  # each commit fails, because another one was made in the meantime
    requests: list[str] = field(default_factory=list)  # "GET /path"
    _server: ThreadingHTTPServer | None = None

    def publish(self, kind: str, identifier: str, files: dict[str, bytes] | Path, revision: str = "main") -> str:
        """Make ``files`` the newest commit of a branch or tag; returns its hash, which depends only on the content."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in sorted(files.rglob("*")) if path.is_file()}
        digest = hashlib.sha1(identifier.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha1(content).digest())
        repository = self.repositories.setdefault((kind, identifier), Repository())
        repository.commits[digest.hexdigest()] = dict(files)
        repository.refs[revision] = digest.hexdigest()
        return digest.hexdigest()

    def commit(self, kind: str, identifier: str, revision: str = "main") -> str:
        return self.repositories[kind, identifier].refs[revision]

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache: Path, *, offline: bool = False, endpoint: str | None = None, token: str | None = None) -> dict[str, str]:
        """Environment of a client process that asks this hub and keeps what it downloads in ``cache``."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": endpoint or self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        chosen = {"HF_HUB_OFFLINE": "1" if offline else None, "HF_TOKEN": token}
        return {**kept, **own, "HF_HUB_DISABLE_XET": "1", **{key: value for key, value in chosen.items() if value}}

    def downloads(self) -> list[str]:
        """The names of the files that were downloaded, completely or partly."""
        files = [request for request in self.requests if request.startswith("GET ") and "/resolve/" in request]
        return [request.rpartition("/resolve/")[2].partition("/")[2] for request in files]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.state
        url = urlsplit(self.path)
        body = self._body()
        hub.requests.append(f"{self.command} {url.path}")
        if hub.is_down:
            self.close_connection = True
            return
        time.sleep(hub.slow_seconds)
        if hub.failures > 0:
            hub.failures -= 1
            self._error(503, "", "Service Unavailable")
        elif self.command in ("POST", "PUT") and UPLOAD.fullmatch(url.path):
            self._upload(url.path, body)
        elif match := API.fullmatch(url.path):
            self._api(match, body, url.query)
        elif match := FILE.fullmatch(url.path):
            self._file(match)
        else:
            self._error(404, "", "Not found")

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # Uploads

    def _owners(self) -> set[str] | None:
        """The owners in whose name the request's token may write; None without a token that is known."""
        return self.state.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _upload(self, path: str, body: bytes) -> None:
        hub = self.state
        if path.startswith("/lfs/"):
            oid = path.rpartition("/")[2]
            if _sha(body) != oid:
                self._error(400, "", "The content is not that of its oid")
                return
            hub.objects[oid] = body
            self._send(200, b"")
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        content = [json.loads(line) for line in body.splitlines()] if "/commit/" in path else json.loads(body)
        if path == "/api/repos/create":
            self._create(f"{content['organization']}/{content['name']}", private=content.get("visibility") == "private")
            return
        match = UPLOAD.fullmatch(path)
        assert match is not None
        identifier = match[1] or match[3]
        repository = hub.repositories.get(("model", identifier))
        if repository is None:
            self._error(404, "RepoNotFound", "Repository not found")
        elif not self._may_write(identifier):
            return
        elif match[3]:
            self._json({"objects": [self._batch(item) for item in content["objects"]]})
        elif match[2] == "preupload":
            files = repository.commits[repository.refs["main"]]
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _git_oid(files[item["path"]]) if item["path"] in files else None,
                }
                for item in content["files"]
            ]
            self._json({"files": modes})
        else:
            self._commit_files(identifier, repository, content)

    def _may_write(self, identifier: str) -> bool:
        owners = self._owners()
        if owners is None:
            self._error(401, "", "Invalid username or password.")
        elif identifier.partition("/")[0] not in owners:
            self._error(403, "", "Forbidden: you must use a write token to upload to this repository.")
        else:
            return True
        return False

    def _create(self, identifier: str, *, private: bool) -> None:
        hub = self.state
        if ("model", identifier) in hub.repositories:
            self._error(409, "", "You already created this model repo")
        elif self._may_write(identifier):
            hub.publish("model", identifier, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if private:
                hub.private.add(identifier)
            self._json({"url": f"{hub.endpoint}/{identifier}", "name": identifier, "id": "0" * 24})

    def _batch(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.state.objects:
            return dict(item)
        return {**item, "actions": {"upload": {"href": f"{self.state.endpoint}/lfs/{item['oid']}", "header": {}}}}

    def _commit_files(self, identifier: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        hub = self.state
        files, (header, *operations) = dict(repository.commits[repository.refs["main"]]), lines
        parent = header["value"].get("parentCommit")
        if hub.moves_on or (parent is not None and parent != repository.refs["main"]):
            self._error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"]) if operation["key"] == "file" else hub.objects[value["oid"]]
        hub.messages.append(header["value"]["summary"])
        commit = hub.publish("model", identifier, files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{hub.endpoint}/{identifier}/commit/{commit}"})

    def _api(self, match: re.Match[str], body: bytes, query: str) -> None:
        kinds, identifier, what, revision, path = match.groups()
        if identifier.rpartition("/")[2] in WHAT:  # an id without an owner
            identifier, _, what = identifier.rpartition("/")
            revision, path = match.group(3), None
        if identifier in self.state.redirects:
            target = self.path.replace(identifier, self.state.redirects[identifier], 1)
            self._send(307, b"", {"Location": target})
            return
        commit_files = self._commit(kinds[:-1], identifier, unquote(revision or "main"))
        if commit_files is None:
            return
        commit, files = commit_files
        folders = sorted({str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."})
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        entries += [{"type": "file", "path": name, "size": len(data), "oid": _sha(data)[:40]} for name, data in sorted(files.items())]
        if what == "tree":
            start = f"{unquote(path)}/" if path else ""
            inside = [entry for entry in entries if str(entry["path"]).startswith(start)]
            if start and not inside:
                self._error(404, "EntryNotFound", "Entry not found")
                return
            deep = parse_qs(query).get("recursive", ["false"])[0].lower() in ("true", "1")
            self._json([entry for entry in inside if deep or "/" not in str(entry["path"]).removeprefix(start)])
        elif what == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            self._json([entry for entry in entries if entry["path"] in wanted])
        elif what == "refs":
            refs = self.state.repositories[kinds[:-1], identifier].refs
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in refs.items()]
            self._json({"branches": branches, "converts": [], "tags": []})
        else:
            gated = "manual" if identifier in self.state.gated else False
            siblings = [{"rfilename": name} for name in sorted(files)]
            if "blobs" in parse_qs(query):
                siblings = [{**item, "blobId": _sha(files[item["rfilename"]])[:40], "size": 1} for item in siblings]
            self._json(
                {
                    "_id": "0" * 24,
                    "id": identifier,
                    "modelId": identifier,
                    "sha": commit,
                    "private": identifier in self.state.private,
                    "gated": gated,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "createdAt": "2025-01-01T00:00:00.000Z",
                    "siblings": siblings,
                }
            )

    def _file(self, match: re.Match[str]) -> None:
        hub = self.state
        kind, identifier, revision, name = "dataset" if match[1] else "model", match[2], unquote(match[3]), unquote(match[4])
        if identifier in hub.redirects:
            self._send(307, b"", {"Location": self.path.replace(identifier, hub.redirects[identifier], 1)})
            return
        if identifier in hub.gated:
            self._error(403, "GatedRepo", f"Access to {kind} {identifier} is restricted. Please log in.")
            return
        commit_files = self._commit(kind, identifier, revision)
        if commit_files is None:
            return
        commit, files = commit_files
        if name not in files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        data = files[name]
        headers = {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            self._send(200, data, headers, "application/octet-stream")
        else:
            first, last = int(part[1]), int(part[2]) if part[2] else len(data) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, data[first : last + 1], headers, "application/octet-stream")

    def _commit(self, kind: str, identifier: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a commit. Sends the error if there is no such commit."""
        repository = self.state.repositories.get((kind, identifier))
        if repository is None or (identifier in self.state.private and identifier.partition("/")[0] not in (self._owners() or ())):
            # Without a login, the real Hub answers in the same way for private and for missing repositories.
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode())

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), {key: value for key, value in told.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, content_type: str = "application/json") -> None:
        self.send_response(status)
        for key, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.state
        if status in (200, 206) and hub.cuts > 0 and hub.cut_after is not None and len(body) > hub.cut_after:
            hub.cuts -= 1
            self.wfile.write(body[: hub.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
