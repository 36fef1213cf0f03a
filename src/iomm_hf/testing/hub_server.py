"""A small Hub on 127.0.0.1, so that tests use the real clients (huggingface_hub, transformers, diffusers, datasets) offline.

It speaks the part of the Hub's HTTP interface that these clients use to create, upload, list, download and stream
repos. As on the Hub, large and binary files go through LFS: they are uploaded by `PUT`, have their sha256 as etag, and
are served by a redirect to another host (`localhost` instead of `127.0.0.1`), which clients must follow without the
token. Content is held by hash and a commit is a JSON manifest, so no part of a requested file's path ever becomes a
path on disk. Without a token a private repo looks missing. Not covered: pull requests, Xet, `expand`ed listings.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, unquote

from ..files import write_whole
from .local_server import LocalServer


GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # the Hub's first commit holds such a file
LFS_MIN_SIZE = 10 * 1024**2  # bytes; text files from this size on go through LFS, binary files always
CLIENT_VARIABLES = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|DIFFUSERS)_\w+", re.ASCII)
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class HubError(Exception):
    """An answer with an error status. `code` is what clients turn into a type, for example `"RevisionNotFound"`."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message.encode("unicode_escape").decode(), **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit: `sha256` finds its content, `oid` is its git id (that of the pointer for an LFS file)."""

    sha256: str
    size: int
    lfs: bool
    oid: str

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def lfs_info(self) -> dict[str, Any] | None:
        # Listings call the hash `oid`, repo infos `sha256`.
        pointer_size = len(lfs_pointer(self.sha256, self.size))
        info = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return info if self.lfs else None


@dataclass(frozen=True)
class Commit:
    """A state of a repo. `id` follows from repo, parent, title and files, so equal histories have equal ids."""

    id: str
    parent: str | None
    title: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Failure:
    remaining: int
    method: str
    path_contains: str
    status: int | None


def is_lfs(sample: bytes, size: int) -> bool:
    return size >= LFS_MIN_SIZE or b"\0" in sample[:512]  # a NUL byte is git's own sign of a binary file


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalHub(LocalServer):
    """
    A Hub that runs in a background thread while the context is open, and keeps its repos in a folder.

    HF_* variables are read when `huggingface_hub` is imported, so use it from a fresh process that gets
    [`~LocalHub.environment`]. Repos can also be written and read directly, without HTTP.

    Args:
        root (`str` or `Path`):
            Folder of the repos. An existing one is served as it is.
        user (`str`, *optional*, defaults to `"user"`):
            Name of the account: the namespace of repos that are created without one.
        token (`str`, *optional*, defaults to `"hf_local"`):
            Needed for writing. Reading works without a token, but not with a wrong one.

    Example:

    ```py
    >>> import tempfile
    >>> with LocalHub(tempfile.mkdtemp()) as hub:
    ...     commit = hub.commit_files("user/model", {"config.json": b"{}"})
    ...     hub.read("user/model", "config.json", revision=commit)
    b'{}'
    ```
    """

    def __init__(self, root: str | Path, user: str = "user", token: str = "hf_local"):
        self.root = Path(root)
        self.user = user
        self.token = token
        self.requests: list[tuple[str, str]] = []  # method and unquoted path, without the query, in order of arrival
        self.announced_uploads: set[str] = set()  # sha256 of the LFS files that a client asked to upload
        self._failures: list[Failure] = []
        self._lock = threading.RLock()
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def handle(self, *connection: Any) -> BaseHTTPRequestHandler:
        return _Handler(self, *connection)

    def environment(self, home: str | Path | None = None) -> dict[str, str]:
        """
        The environment for a child process whose Hub clients shall talk to this server only.

        Args:
            home (`str` or `Path`, *optional*, defaults to a folder inside `root`):
                `HF_HOME`, which holds the client's caches. A new folder means a client with empty caches.

        Returns:
            `dict[str, str]`: this process's environment, with its own Hub variables taken out.
        """
        inherited = {name: value for name, value in os.environ.items() if not CLIENT_VARIABLES.fullmatch(name)}
        local_hosts = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.root / "client"),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": local_hosts,
            "no_proxy": local_hosts,
        }

    def fail_next(
        self, count: int = 1, path_contains: str = "", method: str = "GET", status: int | None = 500
    ) -> None:
        """
        Let the next requests fail that match.

        Args:
            count (`int`, *optional*, defaults to 1): How many requests fail.
            path_contains (`str`, *optional*, defaults to any): A part of the path, such as a file name.
            method (`str`, *optional*, defaults to `"GET"`): The requests' method.
            status (`int`, *optional*, defaults to 500):
                What is answered. `None` cuts the connection half-way through the body.
        """
        self._failures.append(Failure(count, method, path_contains, status))

    def stop_failing(self) -> None:
        """Requests that were still to fail are answered from now on."""
        with self._lock:
            self._failures.clear()

    def take_failure(self, method: str, path: str) -> Failure | None:
        with self._lock:
            for failure in self._failures:
                if failure.remaining and failure.method == method and failure.path_contains in path:
                    failure.remaining -= 1
                    return failure
        return None

    def create_repo(self, repo_id: str, repo_type: str = "model", private: bool = False) -> str:
        """Creates a repo with a first commit that holds `.gitattributes`, as the Hub does, and returns its id."""
        folder = self._folder(repo_id, repo_type)
        with self._lock:
            if folder.exists():
                raise HubError(409, f"You already created this {repo_type} repo: {repo_id}")
            write_whole(folder / "refs.json", json.dumps({"branches": {"main": None}, "tags": {}}).encode())
            if private:
                write_whole(folder / "private", b"")
            return self.commit(repo_id, {".gitattributes": self.store(GITATTRIBUTES)}, "initial commit", repo_type)

    def commit_files(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        repo_type: str = "model",
        branch: str = "main",
        title: str = "Commit files",
    ) -> str:
        """
        Writes files to a repo without HTTP, creating the repo if there is none.

        Args:
            repo_id (`str`): `"namespace/name"`.
            files (`Mapping[str, bytes | None]`): Content by path; `None` deletes the file.
            repo_type (`str`, *optional*, defaults to `"model"`): `"model"`, `"dataset"` or `"space"`.
            branch (`str`, *optional*, defaults to `"main"`): An existing branch.
            title (`str`, *optional*, defaults to `"Commit files"`): The commit's title.

        Returns:
            `str`: the id of the commit, 40 hexadecimal digits.
        """
        with self._lock:
            if not self._folder(repo_id, repo_type).exists():
                self.create_repo(repo_id, repo_type)
            changes = {path: None if content is None else self.store(content) for path, content in files.items()}
            return self.commit(repo_id, changes, title, repo_type, branch)

    def read(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        """Returns the content of a file at a branch, a tag or a commit id."""
        return self.blob_path(self.file(self.resolve(repo_id, revision, repo_type), path).sha256).read_bytes()

    def resolve(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> Commit:
        """Returns the commit of a branch, a tag or a commit id, with `files` by path."""
        folder = self._folder(repo_id, repo_type)
        refs = self.refs(repo_id, repo_type)
        commit_id = refs["branches"].get(revision) or refs["tags"].get(revision) or revision
        manifest = folder / "commits" / f"{commit_id}.json"
        if not re.fullmatch("[0-9a-f]{40}", commit_id) or not manifest.exists():
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        fields = json.loads(manifest.read_text())
        files = {path: StoredFile(**file) for path, file in fields.pop("files").items()}
        return Commit(commit_id, files=files, **fields)

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return (self._folder(repo_id, repo_type) / "private").exists()

    def variables(self, repo_id: str) -> dict[str, str]:
        """The variables of a Space."""
        self.refs(repo_id, "space")  # raises for a missing one
        path = self._folder(repo_id, "space") / "variables.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def set_variables(self, repo_id: str, variables: Mapping[str, str]) -> None:
        write_whole(self._folder(repo_id, "space") / "variables.json", json.dumps(dict(variables)).encode())

    def refs(self, repo_id: str, repo_type: str) -> dict[str, dict[str, str]]:
        path = self._folder(repo_id, repo_type) / "refs.json"
        if not path.exists():
            raise HubError(404, f"Repository not found: {repo_type} {repo_id}", "RepoNotFound")
        refs: dict[str, dict[str, str]] = json.loads(path.read_text())
        return refs

    def create_ref(self, kind: str, name: str, repo_id: str, revision: str, repo_type: str) -> None:
        with self._lock:
            refs = self.refs(repo_id, repo_type)
            if name in refs["branches"] or name in refs["tags"]:
                raise HubError(409, f"Reference already exists: {name}")
            refs[kind][name] = self.resolve(repo_id, revision, repo_type).id
            write_whole(self._folder(repo_id, repo_type) / "refs.json", json.dumps(refs).encode())

    def commit(
        self,
        repo_id: str,
        changes: Mapping[str, StoredFile | None],
        title: str,
        repo_type: str = "model",
        branch: str = "main",
        expected_parent: str | None = None,
    ) -> str:
        with self._lock:
            refs = self.refs(repo_id, repo_type)
            if branch not in refs["branches"]:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            parent = refs["branches"][branch]
            if expected_parent not in (None, parent):
                raise HubError(412, f"A commit has happened since: {branch} is at {parent}, not at {expected_parent}")
            before = self.resolve(repo_id, parent, repo_type).files if parent else {}
            after = dict(before)
            for path, file in changes.items():
                if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
                    raise HubError(400, f"Invalid path: {path!r}; expected names joined by single slashes")
                if file is not None:
                    after[path] = file
                elif after.pop(path, None) is None:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            if after == before:
                return parent
            files = {path: asdict(after[path]) for path in sorted(after)}
            commit_id = hashlib.sha1(json.dumps([repo_type, repo_id, parent, title, files]).encode()).hexdigest()
            date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            folder = self._folder(repo_id, repo_type)
            manifest = {"parent": parent, "title": title, "date": date, "files": files}
            write_whole(folder / "commits" / f"{commit_id}.json", json.dumps(manifest).encode())
            refs["branches"][branch] = commit_id
            write_whole(folder / "refs.json", json.dumps(refs).encode())
            return commit_id

    def store(self, content: bytes, lfs: bool | None = None) -> StoredFile:
        sha256 = hashlib.sha256(content).hexdigest()
        with self._lock:
            write_whole(self.blob_path(sha256), content)
        lfs = is_lfs(content, len(content)) if lfs is None else lfs
        oid = git_oid(lfs_pointer(sha256, len(content)) if lfs else content)
        return StoredFile(sha256, len(content), lfs, oid)

    def blob_path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HubError(400, f"Invalid sha256: {sha256!r}")
        return self.root / "blobs" / sha256

    def file(self, commit: Commit, path: str) -> StoredFile:
        if path not in commit.files:
            # The commit's id lets clients remember the absence.
            raise HubError(404, f"Entry not found: {path!r}", "EntryNotFound", {"X-Repo-Commit": commit.id})
        return commit.files[path]

    def _folder(self, repo_id: str, repo_type: str) -> Path:
        if not REPO_ID.fullmatch(repo_id):
            raise HubError(400, f"Invalid repo id: {repo_id!r}; expected 'namespace/name'")
        if repo_type not in ("model", "dataset", "space"):
            raise HubError(400, f"Invalid repo type: {repo_type!r}; expected 'model', 'dataset' or 'space'")
        return self.root / f"{repo_type}s" / repo_id


Endpoint = TypeVar("Endpoint", bound=Callable[..., None])
ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., None]]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"


def _route(method: str, pattern: str, needs_token: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Has a method of `_Handler` answer these requests; the pattern's groups become its arguments."""

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), needs_token, endpoint))
        return endpoint

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: with Nagle's algorithm the second waits for an ACK

    def __init__(self, hub: LocalHub, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        target, _, self.query = self.path.partition("?")
        # Read also where it goes unused: the connection's next request follows it. No client sends chunks.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(target)
        self.hub.requests.append((self.command, path))
        failure = self.hub.take_failure(self.command, path)
        self.cut = failure is not None and failure.status is None
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True
                raise HubError(411, "The local Hub needs a Content-Length")
            if failure is not None and failure.status is not None:
                raise HubError(failure.status, "This request was told to fail")
            self._dispatch(target)
        except HubError as error:
            self._reply_json({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _dispatch(self, target: str) -> None:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        for method, pattern, needs_token, endpoint in ROUTES:
            match = pattern.fullmatch(target)
            if match is None or method != self.command.replace("HEAD", "GET"):
                continue
            if needs_token and authorization is None:
                raise HubError(401, "Invalid username or password.")
            arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
            if "kind" in arguments:
                arguments["repo_type"] = (arguments.pop("kind") or "models").removesuffix("s")
                if authorization is None and self.hub.is_private(arguments["repo_id"], arguments["repo_type"]):
                    raise HubError(401, f"Repository not found: {arguments['repo_id']}", "RepoNotFound")
            return endpoint(self, **arguments)
        raise HubError(404, f"The local Hub does not serve {self.command} {unquote(target)}")

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            if self.cut:
                self.close_connection = True
                body = body[: len(body) // 2]
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # a client that streams may stop reading at any time
            self.close_connection = True

    def _reply_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _reply_blob(self, sha256: str, headers: Mapping[str, str]) -> None:
        path = self.hub.blob_path(sha256)
        if not path.exists():
            raise HubError(404, f"No content has sha256 {sha256}")
        content = path.read_bytes()
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or match.groups() == ("", ""):
            return self._reply(200, content, headers)
        first, last = match.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return self._reply(206, content[start:stop], headers)

    @_route("GET", "/api/whoami-v2", needs_token=True)
    def _whoami(self) -> None:
        access = {"accessToken": {"displayName": "local", "role": "write"}}
        self._reply_json(
            {"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": [], "auth": access}
        )

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self) -> None:
        self._reply_json({"errors": [], "warnings": []})

    @_route("POST", "/api/repos/create", needs_token=True)
    def _create_repo(self) -> None:
        request = json.loads(self.body)
        repo_type = request.get("type", "model")
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        # With `exist_ok`, clients read the address from the refusal too.
        answer = {"url": self._web_address(repo_id, repo_type), "name": repo_id}
        try:
            self.hub.create_repo(repo_id, repo_type, private=request.get("visibility") == "private")
        except HubError as error:
            self._reply_json({**answer, "error": str(error)}, error.status, error.headers)
        else:
            self._reply_json(answer)

    @_route("GET", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables", needs_token=True)
    @_route("POST", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables", needs_token=True)
    @_route("DELETE", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables", needs_token=True)
    def _variables(self, repo_id: str) -> None:
        request = json.loads(self.body) if self.body else {}
        variables = self.hub.variables(repo_id)
        if self.command == "POST":
            variables[request["key"]] = request["value"]
        elif self.command == "DELETE":
            variables.pop(request["key"], None)
        self.hub.set_variables(repo_id, variables)
        self._reply_json({key: {"key": key, "value": value} for key, value in variables.items()})

    @_route("GET", rf"{API}(?:/revision/{REVISION})?")
    def _repo_info(self, repo_id: str, revision: str, repo_type: str) -> None:
        commit = self.hub.resolve(repo_id, revision or "main", repo_type)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in parse_qs(self.query):
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.oid, "lfs": file.lfs_info}
        answer = {"id": repo_id, "author": repo_id.split("/")[0], "sha": commit.id, "lastModified": commit.date}
        private = self.hub.is_private(repo_id, repo_type)
        self._reply_json({**answer, "private": private, "gated": False, "tags": [], "siblings": siblings})

    @_route("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?")
    def _tree(self, repo_id: str, revision: str, folder: str, repo_type: str) -> None:
        commit = self.hub.resolve(repo_id, revision, repo_type)
        entries = _entries(commit)
        recursive = parse_qs(self.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = [path for path in entries if path.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            self.hub.file(commit, f"{folder}/")  # raises
        depth = folder.count("/") + 1 if folder else 0
        self._reply_json([entries[path] for path in inside if recursive or path.count("/") == depth])

    @_route("POST", rf"{API}/paths-info/{REVISION}")
    def _paths_info(self, repo_id: str, revision: str, repo_type: str) -> None:
        entries = _entries(self.hub.resolve(repo_id, revision, repo_type))
        paths = [path.strip("/") for path in parse_qs(self.body.decode()).get("paths", [])]
        self._reply_json([entries[path] for path in paths if path in entries])

    @_route("GET", rf"{API}/refs")
    def _refs(self, repo_id: str, repo_type: str) -> None:
        answer: dict[str, list[dict[str, str]]] = {"converts": [], "pullRequests": []}
        refs = self.hub.refs(repo_id, repo_type)
        for kind, folder in (("branches", "heads"), ("tags", "tags")):
            answer[kind] = [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": target}
                for name, target in refs[kind].items()
            ]
        self._reply_json(answer)

    @_route("GET", rf"{API}/commits/{REVISION}")
    def _commits(self, repo_id: str, revision: str, repo_type: str) -> None:
        commits = [self.hub.resolve(repo_id, revision, repo_type)]
        while commits[-1].parent is not None:
            commits.append(self.hub.resolve(repo_id, commits[-1].parent, repo_type))
        authors = [{"user": self.hub.user}]
        self._reply_json(
            [{"id": c.id, "title": c.title, "message": "", "date": c.date, "authors": authors} for c in commits]
        )

    @_route("POST", rf"{API}/branch/{REVISION}", needs_token=True)
    def _create_branch(self, repo_id: str, revision: str, repo_type: str) -> None:
        start = json.loads(self.body).get("startingPoint", "main")
        self.hub.create_ref("branches", revision, repo_id, start, repo_type)
        self._reply_json({})

    @_route("POST", rf"{API}/tag/{REVISION}", needs_token=True)
    def _create_tag(self, repo_id: str, revision: str, repo_type: str) -> None:
        self.hub.create_ref("tags", json.loads(self.body)["tag"], repo_id, revision, repo_type)
        self._reply_json({})

    @_route("POST", rf"{API}/preupload/{REVISION}", needs_token=True)
    def _preupload(self, repo_id: str, revision: str, repo_type: str) -> None:
        present = self.hub.resolve(repo_id, revision, repo_type).files
        answer = []
        for file in json.loads(self.body)["files"]:
            lfs = is_lfs(base64.b64decode(file["sample"]), file["size"])
            answer.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if file["path"] in present:
                answer[-1]["oid"] = present[file["path"]].etag  # clients skip what has not changed
        self._reply_json({"files": answer})

    @_route("POST", rf"{WEB}\.git/info/lfs/objects/batch", needs_token=True)
    def _lfs_batch(self, repo_id: str, repo_type: str) -> None:
        self.hub.refs(repo_id, repo_type)  # raises for a missing repo
        objects = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(self.body)["objects"]]
        for file in objects:
            if not self.hub.blob_path(file["oid"]).exists():
                self.hub.announced_uploads.add(file["oid"])
                address = f"{self.hub.endpoint}/lfs/{file['oid']}"
                file["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
        self._reply_json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/(?P<sha256>[^/]+)")
    def _lfs_upload(self, sha256: str) -> None:
        # No token, as with the Hub's signed addresses: the announcement needed one.
        if sha256 not in self.hub.announced_uploads or hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, f"Content was not announced, or is not that of sha256 {sha256}")
        self.hub.store(self.body, lfs=True)
        self._reply(200, b"", {})

    @_route("POST", "/lfs/(?P<sha256>[^/]+)/verify", needs_token=True)
    def _lfs_verify(self, sha256: str) -> None:
        path = self.hub.blob_path(sha256)
        if not path.exists() or path.stat().st_size != json.loads(self.body)["size"]:
            raise HubError(422, f"Content of sha256 {sha256} is missing or has another size")
        self._reply_json({})

    @_route("POST", rf"{API}/commit/{REVISION}", needs_token=True)
    def _commit(self, repo_id: str, revision: str, repo_type: str) -> None:
        if "create_pr" in parse_qs(self.query):
            raise HubError(400, "The local Hub has no pull requests: commit to a branch")
        header: dict[str, str] = {}
        changes: dict[str, StoredFile | None] = {}
        for line in self.body.splitlines():
            operation, value = (item := json.loads(line))["key"], item["value"]
            if operation == "header":
                header = value
            elif operation == "file":
                changes[value["path"]] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
            elif operation == "lfsFile":
                path = self.hub.blob_path(value["oid"])
                if not path.exists():
                    raise HubError(400, f"{value['path']}: its LFS content {value['oid']} was not uploaded")
                changes[value["path"]] = self.hub.store(path.read_bytes(), lfs=True)
            elif operation == "deletedFile":
                changes[value["path"]] = None
            elif operation == "deletedFolder":
                files = self.hub.resolve(repo_id, revision, repo_type).files
                prefix = value["path"].rstrip("/") + "/"
                changes |= {path: None for path in files if path.startswith(prefix)}
            else:
                raise HubError(400, f"Unknown commit operation: {operation!r}")
        commit_id = self.hub.commit(
            repo_id, changes, header["summary"], repo_type, revision, header.get("parentCommit")
        )
        address = f"{self._web_address(repo_id, repo_type)}/commit/{commit_id}"
        self._reply_json({"success": True, "commitOid": commit_id, "commitUrl": address, "hookOutput": ""})

    @_route("GET", rf"{WEB}/resolve/{REVISION}/(?P<path>.+)")
    def _download(self, repo_id: str, revision: str, path: str, repo_type: str) -> None:
        commit = self.hub.resolve(repo_id, revision, repo_type)
        file = self.hub.file(commit, path)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self._reply_blob(file.sha256, headers)
        # The path at the end shows in `requests` which file was fetched.
        address = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/lfs/{file.sha256}/{quote(path)}"
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size), "Location": address}
        return self._reply(302, b"", headers)

    @_route("GET", "/lfs/(?P<sha256>[^/]+)/.+")
    def _lfs_download(self, sha256: str) -> None:
        self._reply_blob(sha256, {"ETag": f'"{sha256}"'})

    def _web_address(self, repo_id: str, repo_type: str) -> str:
        return f"{self.hub.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """The files and folders of a commit by path, as the Hub's listings describe them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        parts = path.split("/")
        for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
            tree_id = hashlib.sha1(f"{commit.id} {folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": tree_id, "size": 0, "path": folder}
        entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path, "lfs": file.lfs_info}
    return entries
