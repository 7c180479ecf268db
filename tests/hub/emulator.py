"""A Hub on 127.0.0.1 that the real client talks to: the part of the HTTP interface that pushing and loading use, and faults on demand.

    server, hub = serve()
    hub.faults.append(Fault("POST", "/commit/", status=503, times=2))

Repositories, commits and files are kept in memory. Files with a NUL byte or a weights' suffix go the way of large files (LFS): batch, PUT, verify, commit.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
import time
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
NAME = r"(?:(?:spaces|datasets)/)?[^/]+/[^/]+"  # of a repository
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer with an error status, as the Hub gives it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match.

    Args:
        method, path: HTTP method and regular expression, searched in the path.
        status: answer with this status instead.
        code: and with this word for what is wrong, X-Error-Code.
        page: and with a page in place of JSON, as what stands before the Hub does.
        drop_after: read the request, or write the answer, up to this many bytes of the body, and close the connection.
        delay: wait so many seconds first.
    """

    method: str
    path: str
    status: int | None = None
    code: str = ""
    page: bool = False
    drop_after: int | None = None
    delay: float = 0.0
    times: int = 1


@dataclass(frozen=True)
class Blob:
    """A file in a commit; `large` ones are known by their SHA-256, others by git's own hash."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        text = self.content
        if self.large:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def described(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass
class Commit:
    sha: str
    files: dict[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repository:
    """Commits, and the branches, tags and pull requests that point to them."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {}, "initial commit")

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> Commit:
        refs = self.pull_requests if ref.startswith("refs/pr/") else self.branches
        commit = Commit(secrets.token_hex(20), files, title, refs.get(ref))
        self.commits[commit.sha] = commit
        refs[ref] = commit.sha
        return commit

    def resolve(self, revision: str) -> Commit:
        name = revision.removeprefix("refs/heads/")
        for refs in (self.branches, self.tags, self.pull_requests):
            if name in refs:
                return self.commits[refs[name]]
        if name in self.commits:
            return self.commits[name]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, newest first."""
        commits, commit = [], self.resolve(revision)
        while commit:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits


class Hub:
    """The state behind the server. Tests look into it and put faults on it."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # large files by SHA-256
        self.faults: list[Fault] = []
        self.users = {"hf_test": ("tester", ["org"]), "hf_guest": ("guest", [])}  # token → name, organisations
        self.lock = threading.RLock()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repositories[repo_id].resolve(revision).files.items()}

    def edit(self, repo_id: str, files: dict[str, bytes | None], title: str = "edited", revision: str = "main") -> str:
        """A commit made on the website; None deletes."""
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(repo_id, private=False))
            tree = dict(repository.resolve(revision).files)
            for path, content in files.items():
                tree.pop(path, None)
                if content is not None:
                    tree[path] = Blob(content, is_large(path, content))
            return repository.commit(revision, tree, title).sha

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str, sample: bytes) -> bool:
    return path.endswith(LARGE_SUFFIXES) or b"\0" in sample


class Handler(BaseHTTPRequestHandler):
    """Routes a request to the method of the first pattern that matches its path."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    ROUTES = [  # pattern of the path → name of the method, which gets the groups; the id of a Space or dataset begins with its kind
        (r"/_faults", "add_fault"),
        (r"/_mend", "take_faults_back"),
        (r"/_edit", "edit"),
        (r"/api/whoami-v2", "whoami"),
        (r"/api/validate-yaml", "validate_yaml"),
        (r"/api/repos/create", "create"),
        (rf"/api/models/({NAME})", "info"),
        (rf"/api/models/({NAME})/revision/([^/]+)", "info"),
        (rf"/api/models/({NAME})/tree/([^/]+)(?:/(.*))?", "tree"),
        (rf"/api/models/({NAME})/paths-info/([^/]+)", "paths_info"),
        (rf"/api/models/({NAME})/refs", "refs"),
        (rf"/api/models/({NAME})/commits/([^/]+)", "commits"),
        (rf"/api/models/({NAME})/preupload/([^/]+)", "preupload"),
        (rf"/api/models/({NAME})/commit/([^/]+)", "commit"),
        (rf"/api/models/({NAME})/branch/([^/]+)", "create_branch"),
        (rf"/api/models/({NAME})/tag/([^/]+)", "create_tag"),
        (rf"/({NAME})\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"/lfs/([0-9a-f]{64})", "lfs_object"),
        (r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
        (rf"/({NAME})/resolve/([^/]+)/(.+)", "resolve"),
    ]

    # Transport ----------------------------------------------------------------------------------------------------------------

    def log_message(self, *args):
        pass

    def handle_request(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault = None if url.path.startswith("/_") else self.hub.fault_for(self.command, url.path)
        self.write_limit = None
        try:
            if fault:
                time.sleep(fault.delay)
            if fault and fault.drop_after is not None and self.command in ("PUT", "POST"):
                self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length") or 0)))
                return self.hang_up()
            self.body = self.read_body()
            if fault and fault.page:
                return self.answer(b"<html>Bad Gateway</html>", fault.status)
            if fault and fault.status is not None:
                raise HubError(fault.status, "a fault of the test", fault.code)
            self.write_limit = fault.drop_after if fault else None
            self.user = self.authenticate()
            for pattern, name in self.ROUTES:
                if match := re.fullmatch(pattern, re.sub("^/api/(spaces|datasets)/", r"/api/models/\1/", re.sub("//+", "/", url.path))):
                    with self.hub.lock:
                        return getattr(self, name)(*(unquote(group) for group in match.groups() if group is not None))
            raise HubError(404, "Not found")
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self.answer({"error": str(error)}, error.status, {"X-Error-Message": str(error), **code})
        except (BrokenPipeError, ConnectionResetError):
            pass
        except Exception as error:
            traceback.print_exc()
            self.answer({"error": repr(error)}, 400)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content: dict | list | bytes | None = None, status: int = 200, headers: dict | None = None):
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=utf-8"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: self.write_limit])
            if self.write_limit is not None:
                self.hang_up()

    def answer_content(self, content: bytes, headers: dict):
        headers = {"Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if first >= len(content):
                return self.answer(None, 416, {"Content-Range": f"bytes */{len(content)}"})
            return self.answer(content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})
        return self.answer(content, 200, headers)

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    # Who may do what ----------------------------------------------------------------------------------------------------------

    def authenticate(self) -> tuple[str, list[str]] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user[0], *self.user[1])

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.owns(repo_id.split("/")[-2])):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise HubError(401, "Invalid username or password.")
        if write and not self.owns(repo_id.split("/")[-2]) and not self.flag("create_pr"):
            raise HubError(403, "Forbidden: you don't have the required permissions")
        return repository

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    # What tests ask for -------------------------------------------------------------------------------------------------------

    def add_fault(self):
        self.hub.faults.append(Fault(**json.loads(self.body)))
        self.answer({})

    def take_faults_back(self):
        self.hub.faults.clear()
        self.answer({})

    def edit(self):
        request = json.loads(self.body)
        files = {path: None if content is None else base64.b64decode(content) for path, content in request["files"].items()}
        self.answer({"sha": self.hub.edit(request["repo_id"], files)})

    # The Hub's interface ------------------------------------------------------------------------------------------------------

    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "fullname": name} for name in self.user[1]]
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        self.answer({"type": "user", "id": "0", "name": self.user[0], "fullname": self.user[0], "orgs": orgs, "auth": token})

    def validate_yaml(self):
        self.answer({"errors": [], "warnings": []})

    def create(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        request = json.loads(self.body)
        namespace = request.get("organization") or self.user[0]
        repo_id = f"{namespace}/{request['name']}"
        if request.get("type") == "space" and "sdk" not in request:
            raise HubError(400, "a Space needs an SDK")
        if request.get("type", "model") != "model":
            repo_id = f"{request['type']}s/{repo_id}"
        url = f"http://{self.headers['Host']}/{repo_id}"
        if not self.owns(namespace):
            raise HubError(403, "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repositories:
            return self.answer({"error": "You already created this repo", "url": url, "name": repo_id}, 409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repositories[repo_id] = Repository(repo_id, private)
        return self.answer({"url": url, "name": repo_id, "id": "0" * 24})

    def info(self, repo_id: str, revision: str = "main"):
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        siblings = [{"rfilename": path, "size": len(blob.content), "blobId": blob.oid} for path, blob in sorted(commit.files.items())]
        facts = {"_id": "0" * 24, "id": repo_id, "modelId": repo_id, "sha": commit.sha, "private": repository.private, "gated": False}
        facts["id"] = re.sub("^(spaces|datasets)/", "", repo_id)
        self.answer({**facts, "tags": [], "downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str = ""):
        files = self.repository(repo_id).resolve(revision).files
        prefix, nodes = f"{folder.strip('/')}/" if folder.strip("/") else "", {}
        for path, blob in sorted(files.items()):
            if path.startswith(prefix):
                inner = path.removeprefix(prefix).split("/")
                for depth in range(1, len(inner) if self.flag("recursive") else min(2, len(inner))):
                    name = prefix + "/".join(inner[:depth])
                    nodes[name] = {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
                if self.flag("recursive") or len(inner) == 1:
                    nodes[path] = blob.described(path)
        if prefix and not nodes:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.answer(list(nodes.values()))

    def paths_info(self, repo_id: str, revision: str):
        files = self.repository(repo_id).resolve(revision).files
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        self.answer([files[path].described(path) for path in paths if path in files])

    def refs(self, repo_id: str):
        repository = self.repository(repo_id)

        def listed(refs, prefix):
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        self.answer(
            {
                "branches": listed(repository.branches, "refs/heads/"),
                "tags": listed(repository.tags, "refs/tags/"),
                "converts": [],
                "pullRequests": listed(repository.pull_requests, ""),
            }
        )

    def commits(self, repo_id: str, revision: str):
        history = self.repository(repo_id).history(revision)
        self.answer([{"id": c.sha, "title": c.title, "message": "", "date": DATE, "authors": [{"user": "tester"}]} for c in history])

    def preupload(self, repo_id: str, revision: str):
        files = self.repository(repo_id, write=True).resolve(revision).files
        modes = []
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], files.get(file["path"])
            mode = "lfs" if is_large(path, base64.b64decode(file["sample"])) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old and old.etag})
        self.answer({"files": modes})

    def commit(self, repo_id: str, revision: str):
        repository = self.repository(repo_id, write=True)
        head, title = repository.resolve(revision), ""
        files = dict(head.files)
        for entry in (json.loads(line) for line in self.body.splitlines() if line.strip()):
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
                if not head.sha.startswith(value.get("parentCommit") or ""):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.uploads:
                    raise HubError(400, f"LFS object {value['oid']} not found")
                files[value["path"]] = Blob(self.hub.uploads[value["oid"]], large=True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        base, extra, ref = f"http://{self.headers['Host']}/{repo_id}", {}, revision.removeprefix("refs/heads/")
        if self.flag("create_pr"):
            number = len(repository.pull_requests) + 1
            ref, extra = f"refs/pr/{number}", {"pullRequestUrl": f"{base}/discussions/{number}"}
            repository.pull_requests[ref] = head.sha
        new = repository.commit(ref, files, title)
        self.answer({"success": True, "hookOutput": "", "commitOid": new.sha, "commitUrl": f"{base}/commit/{new.sha}", **extra})

    def create_branch(self, repo_id: str, branch: str):
        repository = self.repository(repo_id, write=True)
        if branch in repository.branches:
            raise HubError(409, "Reference already exists")
        repository.branches[branch] = repository.resolve(json.loads(self.body).get("startingPoint") or "main").sha
        self.answer({})

    def create_tag(self, repo_id: str, revision: str):
        repository, tag = self.repository(repo_id, write=True), json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise HubError(409, "Tag already exists")
        repository.tags[tag] = repository.resolve(revision).sha
        self.answer({})

    def lfs_batch(self, repo_id: str):
        self.repository(repo_id)
        base, objects = f"http://{self.headers['Host']}/lfs", []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploads:
                address = f"{base}/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": address, "header": {}}, "verify": {"href": f"{address}/verify"}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_object(self, sha256: str):
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != sha256:
                raise HubError(400, "sha256 mismatch")
            self.hub.uploads[sha256] = self.body
            return self.answer({}, headers={"ETag": f'"{sha256}"'})
        return self.answer_content(self.hub.uploads[sha256], {"ETag": f'"{sha256}"'})

    def lfs_verify(self, sha256: str):
        if len(self.hub.uploads.get(sha256, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, "not uploaded")
        self.answer({})

    def resolve(self, repo_id: str, revision: str, path: str):
        commit = self.repository(repo_id).resolve(revision)
        blob, headers = commit.files.get(path), {"X-Repo-Commit": commit.sha}
        if blob is None:
            return self.answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        if not blob.large:
            return self.answer_content(blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        self.hub.uploads[blob.sha256] = blob.content
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content)), "ETag": f'"{blob.oid}"'}
        storage = self.headers["Host"].replace(
            "127.0.0.1", "localhost"
        )  # another host: what the client asks for are the headers of this answer
        return self.answer(None, 302, {**headers, "Location": f"http://{storage}/lfs/{blob.sha256}"})


def serve() -> tuple[ThreadingHTTPServer, Hub]:
    """Starts a Hub in a thread, on a free port of 127.0.0.1; `server.shutdown()` ends it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, hub
