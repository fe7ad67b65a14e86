"""A stand-in for the Hub on this machine, for the real `huggingface_hub` client: repositories, commits, downloads.

    with HubServer(folder) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment})
        hub.files("user/name", "main")  # {path: bytes}

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so its users run in processes of their own.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_dummy"
USER = "user"
DATE = "2026-01-01T00:00:00.000Z"
LARGE_FILES = (".safetensors", ".bin", ".pt", ".pth")  # what the Hub keeps by LFS from the start


class HubError(Exception):
    """An answer other than success, with the code that the client turns into an exception of its own."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Commit:
    """What a repository held at one time: the sha256 of each file by its path."""

    oid: str
    title: str
    files: dict[str, str]
    large: frozenset[str]


@dataclass
class Repository:
    """Commits by their hash, and the branches that name some of them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: dict[str, list[str]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def commit(self, branch: str, title: str, files: dict[str, str], large: set[str]) -> Commit:
        state = json.dumps([title, sorted(files.items()), len(self.commits)])
        commit = Commit(hashlib.sha1(state.encode()).hexdigest(), title, files, frozenset(large))
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        self.history.setdefault(branch, []).append(commit.oid)
        return commit


class HubServer:
    """A Hub on 127.0.0.1, from `__enter__` to `__exit__`.

    Args:
        folder (`Path`): for the contents of files, and for the client's cache, `folder / "home"`.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []  # "GET /user/name/resolve/main/config.json"
        self.lock = threading.RLock()
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Large files are served by another host, to which the client does not follow a HEAD.
        self.storage_url = f"http://localhost:{port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process that is to use this Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Give what a repository holds: contents by path."""
        with self.lock:
            return {path: self.read(sha) for path, sha in self.repository(name).find(revision).files.items()}

    def commits(self, name: str, branch: str = "main") -> list[Commit]:
        """Give the commits of a branch, oldest first, with the empty one that begins it."""
        repository = self.repository(name)
        return [repository.commits[oid] for oid in repository.history[branch]]

    # For the handler

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[name]

    def create(self, name: str, **options: bool) -> bool:
        """Make a repository, of any owner; `options` are those of `Repository`."""
        with self.lock:
            if name in self.repositories:
                return False
            self.repositories[name] = Repository(**options)
            self.repositories[name].commit("main", "initial commit", {}, set())
            return True

    def store(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / sha).write_bytes(data)
        return sha

    def has(self, sha: str) -> bool:
        return (self.folder / "blobs" / sha).is_file()

    def read(self, sha: str) -> bytes:
        return (self.folder / "blobs" / sha).read_bytes()


def _is_ignored(path: str, gitignore: str) -> bool:
    """Match the two kinds of lines that are needed: `/anchored` and `anywhere`."""
    for pattern in gitignore.split():
        target = path if pattern.startswith("/") else path.rsplit("/", 1)[-1]
        if fnmatch.fnmatchcase(target, pattern.removeprefix("/")):
            return True
    return False


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{NAME}/refs", "list_refs"),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "list_tree"),
    ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?", "describe"),
    ("POST", rf"/api/models/{NAME}/paths-info/(?P<revision>[^/]+)", "describe_paths"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<revision>[^/]+)", "create_branch"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<sha>[0-9a-f]{64})", "upload"),
    ("GET", r"/storage/(?P<sha>[0-9a-f]{64})/(?P<path>.+)", "download_stored"),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
]


class _Handler(BaseHTTPRequestHandler):
    """One connection: finds the method that answers a request by `ROUTES`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the client waits 40 ms for every body

    def __init__(self, hub: HubServer, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def do_GET(self):
        """Answer, errors as JSON with the headers that the client reads."""
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for command, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if command == method and match is not None:
                    # A branch may have slashes, which arrive as %2F.
                    found = {k: v and unquote(v) for k, v in match.groupdict().items()}
                    self._check_rights(command, name, found.get("name"))
                    getattr(self, name)(**found)
                    return
            raise HubError(404, "RepoNotFound", f"There is nothing at {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            self._send_json({"error": str(error)}, error.status, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _check_rights(self, command: str, method: str, repository: str | None):
        """Refuse what the Hub refuses to strangers, and to users with what is not theirs."""
        is_user = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        writes = command != "GET" and method not in ("upload", "describe_paths")
        if writes and not is_user:
            raise HubError(401, "", "Invalid username or password.")
        if repository is None:
            return
        is_owner = is_user and repository.startswith(f"{USER}/")
        if writes and not is_owner:
            raise HubError(403, "", f"You may not write to {repository}")

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send_json(self, value, status: int = 200, headers: dict | None = None):
        data = json.dumps(value).encode()
        self._send(data, status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Repositories

    def whoami(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "", "Invalid username or password.")
        self._send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def create_repository(self):
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        if not name.startswith(f"{USER}/"):
            raise HubError(403, "", f"You may not make {name}")
        # Older clients say `private`, newer ones `visibility`.
        private = bool(request.get("private")) or request.get("visibility") == "private"
        created = self.hub.create(name, private=private)
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if not created:
            answer["error"] = "You already created this model repo"
        self._send_json(answer, 200 if created else 409)

    def validate_yaml(self):
        self._send_json({"errors": [], "warnings": []})

    def describe(self, name, revision):
        repository = self.hub.repository(name)
        commit = repository.find(revision or "main")
        self._send_json(
            {
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repository.private,
                "gated": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "createdAt": DATE,
                "lastModified": DATE,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def list_refs(self, name):
        repository = self.hub.repository(name)
        heads = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in repository.branches.items()]
        self._send_json({"converts": [], "pullRequests": [], "branches": heads, "tags": []})

    def create_branch(self, name, revision):
        repository = self.hub.repository(name)
        start = repository.find(json.loads(self.body or b"{}").get("startingPoint") or "main")
        repository.branches[revision] = start.oid
        repository.history[revision] = [start.oid]
        self._send_json({})

    def _entry(self, commit: Commit, path: str) -> dict:
        data = self.hub.read(commit.files[path])
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if path in commit.large:
            entry["lfs"] = {"oid": commit.files[path], "size": len(data), "pointerSize": 130}
        return entry

    def list_tree(self, name, revision, path):
        commit = self.hub.repository(name).find(revision)
        prefix = f"{path}/" if path else ""
        inside = sorted(entry for entry in commit.files if entry.startswith(prefix))
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {
            prefix + entry.removeprefix(prefix).split("/")[0] for entry in inside if "/" in entry[len(prefix) :]
        }
        if not is_recursive:
            inside = [entry for entry in inside if "/" not in entry[len(prefix) :]]
        entries = [
            {"type": "directory", "path": folder, "oid": _git_oid(folder.encode())} for folder in sorted(folders)
        ]
        self._send_json([*entries, *(self._entry(commit, entry) for entry in inside)])

    def describe_paths(self, name, revision):
        commit = self.hub.repository(name).find(revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        self._send_json([self._entry(commit, path) for path in paths if path in commit.files])

    # Uploads

    def preupload(self, name, revision):
        request, commit = json.loads(self.body), self.hub.repository(name).find(revision)
        stored = self.hub.read(commit.files[".gitignore"]).decode() if ".gitignore" in commit.files else ""
        gitignore = request.get("gitIgnore", stored)

        def answer(file: dict) -> dict:
            path, is_binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            oid = self._entry(commit, path)["oid"] if path in commit.files else None
            return {
                "path": path,
                "uploadMode": "lfs" if is_binary or path.endswith(LARGE_FILES) else "regular",
                "shouldIgnore": _is_ignored(path, gitignore),
                "oid": oid,
            }

        self._send_json({"files": [answer(file) for file in request["files"]]})

    def lfs_batch(self, name):
        self.hub.repository(name)
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not self.hub.has(item["oid"]):
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}", "header": {}}}
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def upload(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise HubError(400, "BadDigest", "The content is not what was announced")
        self.hub.store(self.body)
        self._send(b"", 200, {})

    def commit(self, name, revision):
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            repository = self.hub.repository(name)
            if revision not in repository.branches:
                raise HubError(404, "RevisionNotFound", f"There is no branch {revision}")
            before = repository.find(revision)
            files, large = dict(before.files), set(before.large)
            for line in lines[1:]:
                self._apply(line["key"], line["value"], files, large)
            commit = repository.commit(revision, lines[0]["value"]["summary"], files, large & files.keys())
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"}
        self._send_json(answer)

    def _apply(self, key: str, value: dict, files: dict, large: set):
        path = value["path"]
        if key == "file":
            files[path] = self.hub.store(base64.b64decode(value["content"]))
            large.discard(path)
        elif key == "lfsFile":
            if not self.hub.has(value["oid"]):
                raise HubError(400, "LfsObjectNotFound", f"{path} was not uploaded")
            files[path] = value["oid"]
            large.add(path)
        elif key == "deletedFile":
            del files[path]
        elif key == "deletedFolder":
            for entry in [entry for entry in files if entry.startswith(path.rstrip("/") + "/")]:
                del files[entry]
        else:
            raise HubError(400, "BadRequest", f"Unknown operation {key}")

    # Downloads

    def download(self, name, revision, path):
        commit = self.hub.repository(name).find(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        sha = commit.files[path]
        data = self.hub.read(sha)
        if path not in commit.large:
            self._send(data, 200, {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": commit.oid})
            return
        linked = {"X-Repo-Commit": commit.oid, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": len(data)}
        self._send(b"", 302, {**linked, "Location": f"{self.hub.storage_url}/storage/{sha}/{path}"})

    def download_stored(self, sha, path):
        if not self.hub.has(sha):
            raise HubError(404, "EntryNotFound", "There is no such object")
        self._send(self.hub.read(sha), 200, {"ETag": f'"{sha}"'})


__all__ = ["TOKEN", "USER", "HubServer"]
