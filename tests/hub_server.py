"""A Hugging Face Hub on this machine, as far as huggingface_hub and transformers speak to it."""

import base64
import collections
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import transformers.utils.hub
import yaml

TOKEN = "hf_that_may_do_everything"
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.png", "*tfevents*")
LFS_BYTES = 10 * 2**20
ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_PATTERNS)
ERRORS = {
    401: "Invalid username or password.",
    403: "Authorization error.",
    404: "Repository not found",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
}

TASK, DATASET = {"type": str}, {"name": str, "type": str}
METRIC = {"type": str, "value": (int, float, str)}
RESULT = {"task": TASK, "dataset": DATASET, "metrics": [METRIC]}
MODEL_INDEX = [{"name": str, "results": [RESULT]}]


def use(endpoint, patch):
    """Lets this process's client know the Hub at `endpoint` alone; `patch` is a MonkeyPatch."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    # The clients that know the other one; older versions of transformers have none of their own.
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


Commit = collections.namedtuple("Commit", "sha title files lfs")  # all files, not the changed ones


class RefusedError(Exception):
    def __init__(self, status, error=None, code=None, headers=None):
        error = error or ERRORS.get(status) or responses.get(status, "")
        code = code or (status == 404 and "RepoNotFound")
        own = {"X-Error-Message": error} | ({"X-Error-Code": code} if code else {})
        super().__init__(status, {"error": error}, own | (headers or {}))


class Repo:
    def __init__(self, private):
        self.private = private
        self.branches = {"main": []}
        self.add("main", "initial commit", {".gitattributes": ATTRIBUTES.encode()}, set())

    def add(self, branch, title, files, lfs):
        commit = Commit(secrets.token_hex(20), title, files, lfs)
        self.branches[branch].append(commit)
        return commit.sha

    def history(self, revision):
        """The commits up to the one that a branch ends in, or that has this sha."""
        for branch, commits in self.branches.items():
            shas = [commit.sha for commit in commits]
            if revision in (branch, *shas):
                return commits if revision == branch else commits[: shas.index(revision) + 1]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    """
    with Hub() as hub:
        hub.fail("POST /api/.*/commit/", 500, times=1)
        subprocess.run(command, env=hub.environment(tmp_path / "home"))
        hub.files("someone/model")["README.md"]
    """

    token, user = TOKEN, "someone"

    def __init__(self):
        self.repos, self.objects, self.faults = {}, {}, []
        self.requests = []  # (method, path, authorization), in the order of their arrival
        self.cards = []  # the model cards whose metadata a client had checked
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.faults.insert(0, ["", None, None])  # for connections that are kept alive
        self.server.shutdown()
        self.server.server_close()

    def environment(self, folder, token=TOKEN):
        """For a process that knows no other Hub; `folder` becomes its HF_HOME."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        own |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, that is not spoken here
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return own | ({"HF_TOKEN": token} if token else {})

    def fail(self, match, status, times=None, headers=None):
        """Answers the next `times` requests (None: all) whose "METHOD path" has `match` in it."""
        self.faults.append([match, times, {"status": status, "headers": headers}])

    def drop(self, match, times=None):
        """Closes the connection amid the body of such requests."""
        self.faults.append([match, times, None])

    def fault(self, line):
        with self.lock:
            for fault in self.faults:
                if fault[1] != 0 and re.search(fault[0], line):
                    fault[1] = fault[1] and fault[1] - 1
                    return fault
        return None

    def files(self, repo, revision="main"):
        return dict(self.repos[repo].history(revision)[-1].files)

    def commits(self, repo, revision="main"):
        """Their titles, from the repository's "initial commit" on."""
        return [commit.title for commit in self.repos[repo].history(revision)]

    def private(self, repo):
        return self.repos[repo].private


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits until the headers have been acknowledged

    def log_message(self, *_):
        pass

    def handle_any(self):
        hub = self.hub = self.server.hub
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        fault = hub.fault(f"{self.command} {self.path}")
        size = int(self.headers.get("Content-Length", 0))
        if fault and fault[2] is None:
            self.rfile.read(size // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self.rfile.read(size)
        try:
            if fault:
                raise RefusedError(**fault[2])
            function, groups = self.route()
            with hub.lock:
                status, body, headers = function(self, *groups)
        except RefusedError as refused:
            status, body, headers = refused.args
            if status == 401 and re.search("^/api/models/|/resolve/", self.path):
                # What the client concludes by itself where such a URL begins with https.
                headers = {"X-Error-Code": "RepoNotFound"} | headers
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json; charset=utf-8"} | headers
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        with contextlib.suppress(ConnectionError):  # whoever asked may be gone
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def route(self):
        for methods, pattern, function in ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if match and self.command in methods.split():
                return function, [unquote(group) for group in match.groups()]
        raise RefusedError(404, "Sorry, we can't find the page you are looking for.")

    def authorized(self):
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def authorize(self):
        if not self.authorized():
            realm = 'Bearer realm="Authentication required", charset="UTF-8"'
            raise RefusedError(401, headers={"WWW-Authenticate": realm})

    def repo(self, name, write=False):
        if write:
            self.authorize()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.authorized()):
            raise RefusedError(404 if "Authorization" in self.headers else 401)
        return repo

    def head(self, name, revision, write=False):
        return self.repo(name, write).history(revision)[-1]

    def whoami(self):
        self.authorize()
        auth = {"type": "access_token", "accessToken": {"displayName": "all", "role": "write"}}
        return 200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": auth}, {}

    def create(self):
        self.authorize()
        asked = json.loads(self.body)
        name = f"{asked['organization'] or self.hub.user}/{asked['name']}"
        found = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, found | {"error": "You already created this model repo"}, {}
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        return 200, found, {}

    def validate(self):
        content = json.loads(self.body)["content"]
        self.hub.cards.append(content)
        try:
            card = metadata(content)
            wrong = list(objections(card or {}))
        except yaml.YAMLError as error:
            wrong = [str(error)]
        warnings = [] if wrong or card else ["empty or missing yaml metadata in repo card"]
        body = {"errors": wrong, "warnings": warnings}
        body = {kind: [{"message": text} for text in texts] for kind, texts in body.items()}
        return 400 if wrong else 200, body, {}

    def preupload(self, name, revision):
        commit = self.head(name, revision, write=True)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = file["size"] > LFS_BYTES or any(fnmatch.fnmatch(path, p) for p in LFS_PATTERNS)
            mode = "lfs" if lfs else "regular"
            oid = object_id(commit, path) if path in commit.files else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files, "commitOid": commit.sha}, {}

    def lfs_batch(self, name):
        self.repo(name, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "The content is not what its name says")
        self.hub.objects[oid] = self.body
        return 200, b"", {}

    def lfs_verify(self, name):
        self.repo(name, write=True)
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "The object was not uploaded", "EntryNotFound")
        return 200, {}, {}

    def commit(self, name, branch):
        parent = self.head(name, branch, write=True)
        files, lfs = dict(parent.files), set(parent.lfs)
        header, *changes = (json.loads(line)["value"] for line in self.body.splitlines())
        for change in changes:
            path, oid = change["path"], change.get("oid")
            if "content" in change:
                files[path] = base64.b64decode(change["content"])
            elif oid is None and path in files:
                del files[path]
            elif oid in self.hub.objects:
                files[path] = self.hub.objects[oid]
            else:
                raise RefusedError(400, f"Nothing is known of {path}")
            lfs = lfs | {path} if oid else lfs - {path}
        sha = self.repo(name).add(branch, header["summary"], files, lfs)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        return 200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}, {}

    def branch(self, name, branch):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise RefusedError(409, "Reference already exists")
        start = json.loads(self.body).get("startingPoint", "main")
        repo.branches[branch] = list(repo.history(start))
        return 200, {}, {}

    def info(self, name, revision="main"):
        commit = self.head(name, revision)
        card = metadata(commit.files.get("README.md", b"").decode()) or {}
        license_tags = [f"license:{card['license']}"] if "license" in card else []
        body = {
            "id": name,
            "sha": commit.sha,
            "private": self.repo(name).private,
            "tags": card.get("tags", []) + license_tags,
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        keys = ("pipeline_tag", "library_name", "model-index")
        return 200, body | {key: card[key] for key in keys if key in card}, {}

    def tree(self, name, revision, folder=""):
        commit = self.head(name, revision)
        start = f"{folder}/" if folder else ""
        entries = {}
        for path, content in commit.files.items():
            if path.startswith(start):
                first, _, rest = path.removeprefix(start).partition("/")
                if rest and "recursive=true" not in self.path.lower():
                    entry = {"type": "directory", "path": start + first, "size": 0, "oid": first}
                else:
                    oid, size = git_hash(content), len(content)
                    entry = {"type": "file", "path": path, "size": size, "oid": oid}
                    if path in commit.lfs:
                        entry["lfs"] = {"oid": object_id(commit, path), "size": size}
                        entry["lfs"]["pointerSize"] = 130
                entries[entry["path"]] = entry
        if not entries:
            raise RefusedError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        return 200, [entries[path] for path in sorted(entries)], {}

    def resolve(self, name, revision, path):
        commit = self.head(name, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        content = commit.files[path]
        headers["ETag"] = f'"{object_id(commit, path)}"'
        if path in commit.lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
        return 200, content, headers


MODEL, REVISION = "/api/models/(.+?)", "/([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"{MODEL}/preupload{REVISION}", Handler.preupload),
    ("POST", f"{MODEL}/commit{REVISION}", Handler.commit),
    ("POST", f"{MODEL}/branch{REVISION}", Handler.branch),
    ("GET", f"{MODEL}/tree{REVISION}", Handler.tree),
    ("GET", f"{MODEL}/tree{REVISION}/(.+)", Handler.tree),
    ("GET", f"{MODEL}/revision{REVISION}", Handler.info),
    ("GET", MODEL, Handler.info),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", r"/(.+)\.git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", "/lfs/(.+)", Handler.lfs_put),
    ("GET HEAD", f"/(.+?)/resolve{REVISION}/(.+)", Handler.resolve),
]


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def object_id(commit, path):
    content = commit.files[path]
    return hashlib.sha256(content).hexdigest() if path in commit.lfs else git_hash(content)


def metadata(card):
    """The YAML before a model card's text; None where there is none."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    return yaml.safe_load(block[1]) if block else None


def objections(card):
    """What the Hub has against a model card's metadata."""
    if not isinstance(card, dict):
        yield "metadata must be a mapping"
        return
    if "model-index" in card:
        yield from misfits(card["model-index"], MODEL_INDEX, "model-index")
    for key in ("base_model", "datasets"):
        names = card.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
                yield f'"{key}" with value "{name}" is not valid. Use an id from the Hub.'


def misfits(value, form, where):
    kind = type(form) if isinstance(form, list | dict) else form
    if not isinstance(value, kind):
        yield f'"{where}" is required' if value is None else f'"{where}" is of another type'
    elif isinstance(form, list):
        for i, item in enumerate(value):
            yield from misfits(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        for key, part in form.items():
            yield from misfits(value.get(key), part, f"{where}.{key}")
