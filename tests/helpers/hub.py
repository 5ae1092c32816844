"""A small hub on the loopback interface, for the real huggingface_hub client: downloads, ranges, revisions, pushes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

OWNER, TOKEN = "owner", "hf_right"
LARGE = (".safetensors", ".bin", "tokenizer.json")  # what .gitattributes of a new repository gives to LFS
UNKNOWN = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


@dataclass
class Repo:
    """Commits, newest last, and what branches and tags stand for."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[branch] = dict(files), message, sha
        return sha


@dataclass
class Refusal(Exception):
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


class Hub:
    """What the server holds, how it misbehaves, and what was asked of it.

    fails: path prefix -> the refusal to answer with. cuts: file name -> after how many bytes its next download breaks
    off. during: file name -> what to call once its next download has begun. account: what whoami says of `TOKEN`.
    served: bytes of each file that went out. asked: (method, path) of each request.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.clear()

    def clear(self) -> None:
        """As it is when it starts."""
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.fails: dict[str, Refusal] = {}
        self.cuts: dict[str, int] = {}
        self.during: dict[str, Callable[[], object]] = {}
        self.ranges = True
        self.elsewhere = False  # large files are served by another host, as those of the hub are
        self.leaked = False  # whether that host was sent a token
        self.page = 1000
        self.account: dict = {"name": OWNER, "orgs": [{"name": "lab", "roleInOrg": "write"}], "role": "write"}
        self.served: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []

    def add(self, repo: str, folder: Path | Mapping[str, bytes], revision: str = "main") -> str:
        """A commit with the files of `folder` and no others; its hash."""
        if isinstance(folder, Path):
            folder = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
        return self.repos.setdefault(repo, Repo()).commit(folder, revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        held = self.repos[repo]
        return held.commits[held.refs.get(revision, revision)]


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
    """Let this process's client, which read its environment long ago, talk to `hub` and keep its cache in `home`."""
    close_session()
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "DOWNLOAD_CHUNK_SIZE": 1 << 12,  # in which a download that broke off goes on
        "HF_HUB_DISABLE_XET": True,  # a protocol of its own, which this hub does not speak
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write", "may_write"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/elsewhere/([^/]+/[^/]+)/([^/]+)/(.+)", "elsewhere"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "store"),
    )

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, path))
        try:
            for prefix, refusal in self.hub.fails.items():
                if path.startswith(prefix):
                    raise refusal
            if self._token() not in (None, TOKEN):
                raise Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            for wanted, pattern, name in self.ROUTES:
                if wanted == method and (found := re.fullmatch(pattern, path)):
                    getattr(self, name)(*(part and unquote(part) for part in found.groups()))
                    return
            raise Refusal(404)
        except Refusal as refusal:
            self._send(refusal.status, b"{}", refusal.headers)

    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        return None if given is None else given.removeprefix("Bearer ")

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that has read enough
                self.wfile.write(body)

    def _json(self, content: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    # ---- reading

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and self._token() is None:
            raise Refusal(401 if self._token() is None else 404, UNKNOWN)
        return repo

    def _sha(self, name: str, revision: str) -> str:
        repo = self._repo(name)
        if (sha := repo.refs.get(revision, revision)) not in repo.commits:
            raise Refusal(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return sha

    def info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        sha = self._sha(name, revision or "main") if repo.commits or revision else None
        self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": []})

    def tree(self, name: str, revision: str) -> None:
        files = self.hub.files(name, self._sha(name, revision))
        entries = [_entry(path, content) for path, content in sorted(files.items())]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            folders = sorted({path.split("/")[0] for path in files if "/" in path})
            entries = [entry for entry in entries if "/" not in entry["path"]]
            entries += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + self.hub.page
        following = (
            f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={self.query['recursive'][0]}&cursor={stop}"
        )
        self._json(entries[start:stop], {"Link": f'<{following}>; rel="next"'} if stop < len(entries) else None)

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo, sha = self._repo(name), self._sha(name, revision)
        if repo.gated:
            raise Refusal(401 if self._token() is None else 403, {"X-Error-Code": "GatedRepo"})
        if (content := repo.commits[sha].get(file)) is None:
            raise Refusal(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(content))}
        if self.hub.elsewhere and file.endswith(LARGE):
            other = self.hub.endpoint.replace("127.0.0.1", "localhost")
            self._send(302, b"", {**headers, "Location": f"{other}/elsewhere/{name}/{sha}/{file}"})
        else:
            self._content(content, headers, file)

    def elsewhere(self, name: str, sha: str, file: str) -> None:
        self.hub.leaked |= self._token() is not None
        self._content(self.hub.repos[name].commits[sha][file], {}, file)

    def _content(self, content: bytes, headers: dict[str, str], file: str) -> None:
        status, part = 200, content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.hub.ranges:
            start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            status, part = 206, content[start : stop + 1]
            headers = {**headers, "Content-Range": f"bytes {start}-{stop}/{len(content)}"}
        if self.command == "HEAD":
            self._send(status, part, headers)
        elif (cut := self.hub.cuts.pop(file, None)) is not None and cut < len(part):
            self.hub.served[file] += cut
            self._send(status, part[:cut], {**headers, "Content-Length": str(len(part))})
            self.close_connection = True
        else:
            self._stream(status, part, headers, file)

    def _stream(self, status: int, part: bytes, headers: Mapping[str, str], file: str) -> None:
        """In small parts, so that what a client leaves unread is not counted as served (sockets hold some of it)."""
        self._send(status, b"", {**headers, "Content-Length": str(len(part))})
        for start in range(0, len(part), 8192):
            try:
                self.wfile.write(part[start : start + 8192])
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return
            self.hub.served[file] += len(part[start : start + 8192])
            self.hub.during.pop(file, lambda: None)()

    # ---- accounts and writing

    def _require_token(self) -> None:
        if self._token() is None:
            raise Refusal(401, {"X-Error-Message": "Invalid username or password."})

    def _require_write(self, owner: str) -> None:
        self._require_token()
        account = self.hub.account
        mine = {account["name"], *(org["name"] for org in account["orgs"] if org["roleInOrg"] != "read")}
        if account["role"] == "read" or owner not in mine:
            raise Refusal(403, {"X-Error-Message": f"You don't have the rights to create a model under {owner}"})

    def whoami(self) -> None:
        self._require_token()
        account = self.hub.account
        self._json({**account, "type": "user", "auth": {"accessToken": {"role": account["role"]}}})

    def may_write(self, name: str) -> None:
        self._repo(name)
        self._require_write(name.split("/")[0])
        self._json({})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or self.hub.account["name"]
        self._require_write(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            raise Refusal(409)
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def card(self) -> None:
        self._json({"errors": [], "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        self._require_write(name.split("/")[0])
        repo = self._repo(name)
        if branch in repo.refs:
            raise Refusal(409)
        repo.refs[branch] = self._sha(name, json.loads(self.body or b"{}").get("startingPoint", "main"))
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        self._require_write(name.split("/")[0])
        ignored = self.hub.files(name, self._sha(name, revision)).get(".gitignore", b"").decode().split()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": file["path"] in ignored,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, name: str) -> None:
        self._require_write(name.split("/")[0])
        objects = [
            {"oid": held["oid"], "size": held["size"]}
            | (
                {}
                if held["oid"] in self.hub.blobs
                else {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{held['oid']}"}}}
            )
            for held in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send(200, b"")

    def commit(self, name: str, branch: str) -> None:
        self._require_write(name.split("/")[0])
        repo, message = self._repo(name), ""
        files = dict(repo.commits[self._sha(name, branch)])
        for line in self.body.splitlines():
            kind, value = (json.loads(line)[key] for key in ("key", "value"))
            if kind == "header":
                message = "\n".join(filter(None, (value["summary"], value["description"])))
                if value.get("parentCommit") not in (None, repo.refs[branch]):
                    raise Refusal(412)
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, branch, message)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
