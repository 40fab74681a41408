"""A Hub of this machine: the protocol of huggingface.co over bare git repositories and LFS objects, for unmodified clients.

`python hub.py FOLDER PORT` serves on 127.0.0.1 alone. FOLDER holds `git/KIND/OWNER/NAME.git` with the LFS
objects in `lfs/SHA256`, `tokens.json` ({token: {"name": user, "write": bool}}) and `requests.jsonl`, a line a request. What is
stored outlives the process; faults, asked for by POST /faults, do not. `Hub` starts and stops such a process.
"""

from __future__ import annotations

import asyncio
import base64
import fnmatch
import functools
import hashlib
import hmac
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import yaml
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

_AUTHOR = {f"GIT_{who}_{what}": "hub" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
_LARGE = "".join(f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("safetensors", "bin", "png", "parquet", "gguf"))
_ID = r"[\w.-]+/[\w.-]+"


class Refused(Exception):
    """An answer that is an error, in the Hub's words for it."""

    def __init__(self, status: int, code: str | None = None, message: str | None = None) -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message or code}
        self.message = message or code or str(status)

    def response(self) -> Response:
        headers = {k: v for k, v in self.headers.items() if v}
        return JSONResponse({"error": self.message}, self.status, headers)


# --- repositories ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; `large` is the sha256 and size of an LFS object."""

    kind: str
    oid: str
    size: int
    path: str
    large: tuple[str, int] | None = None

    def json(self) -> dict[str, Any]:
        shown = {"type": {"blob": "file", "tree": "directory"}[self.kind], "oid": self.oid, "path": self.path}
        if self.large is None:
            return shown | {"size": self.size}
        lfs = {"oid": self.large[0], "size": self.large[1], "pointerSize": self.size}
        return shown | {"size": self.large[1], "lfs": lfs}


@dataclass(frozen=True)
class Repository:
    """A bare git repository whose large files are LFS pointers."""

    path: Path

    def git(self, *arguments: str, stdin: bytes = b"", check: bool = True, **environment: str) -> bytes:
        done = subprocess.run(
            ["git", *arguments], cwd=self.path, input=stdin, capture_output=True, check=False,
            env=os.environ | _AUTHOR | environment,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout if not done.returncode else b""

    @staticmethod
    def create(path: Path, *, private: bool) -> Repository:
        path.mkdir(parents=True)
        repository = Repository(path)
        repository.git("init", "--quiet", "--bare", "--initial-branch=main")
        (path / "lfs").mkdir()
        repository.git("config", "hub.private", str(private).lower())
        repository.commit("main", None, "initial commit", {".gitattributes": _LARGE.encode()}, [])
        return repository

    @property
    def private(self) -> bool:
        return self.git("config", "hub.private").strip() == b"true"

    def large(self, oid: str) -> Path:
        return self.path / "lfs" / oid

    def resolve(self, revision: str) -> str:
        found = self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False).decode().strip()
        if not found:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def entries(self, revision: str, *options: str) -> dict[str, Entry]:
        listed = self.git("ls-tree", "-z", "-l", "--full-tree", *options, self.resolve(revision)).decode().split("\0")
        found = {}
        for line in filter(None, listed):
            about, _, path = line.partition("\t")
            _, kind, oid, size = about.split()
            length = 0 if size == "-" else int(size)
            large = self._large(oid) if 0 < length < 200 else None
            found[path] = Entry(kind, oid, length, path, large)
        return found

    def _large(self, oid: str) -> tuple[str, int] | None:
        pointer = re.fullmatch(rb"version https://git-lfs\S+\noid sha256:(\w{64})\nsize (\d+)\n", self.blob(oid))
        return (pointer[1].decode(), int(pointer[2])) if pointer else None

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def commit(self, branch: str, parent: str | None, title: str, added: dict[str, bytes], deleted: list[str]) -> str:
        """Lay files over a commit and move the branch to the result, unless it was moved by another meanwhile."""
        index = {"GIT_INDEX_FILE": str(self.path / f"index.{time.monotonic_ns()}")}
        if parent:
            self.git("read-tree", parent, **index)
        lines = [f"0 {'0' * 40}\t{path}" for path in deleted]
        for path, content in added.items():
            lines.append(f"100644 {self.git('hash-object', '-w', '--stdin', stdin=content).decode().strip()}\t{path}")
        self.git("update-index", "--index-info", stdin="".join(f"{line}\n" for line in lines).encode(), **index)
        tree = self.git("write-tree", **index).decode().strip()
        Path(index["GIT_INDEX_FILE"]).unlink(missing_ok=True)
        parents = ["-p", parent] if parent else []
        made = self.git("commit-tree", tree, *parents, stdin=title.encode()).decode().strip()
        self.git("update-ref", f"refs/heads/{branch}", made, parent or "")
        return made

    def branches(self) -> dict[str, str]:
        listed = self.git("for-each-ref", "--format=%(refname:short) %(objectname)", "refs/heads").decode().split()
        return dict(zip(listed[::2], listed[1::2], strict=True))


# --- the protocol ----------------------------------------------------------------------------------------------------


@dataclass
class Protocol:
    """The endpoints that huggingface_hub calls, over a folder."""

    folder: Path
    faults: list[dict[str, Any]] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        secret = self.folder / "secret"
        if not secret.exists():
            secret.write_bytes(os.urandom(32))
        self.secret = secret.read_bytes()

    # who asks, and for what

    def user(self, request: Request) -> dict[str, Any] | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        users: dict[str, dict[str, Any]] = json.loads((self.folder / "tokens.json").read_text())
        if given not in users:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return users[given]

    def at(self, kind: str, name: str) -> Path:
        return self.folder / "git" / kind / f"{name}.git"

    def repository(self, request: Request, kind: str, name: str, *, write: bool = False) -> Repository:
        user, path = self.user(request), self.at(kind, name)
        mine = user is not None and user["name"] == name.partition("/")[0]
        if not path.is_dir() or (Repository(path).private and not mine):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (mine and user and user["write"]):
            raise Refused(403, None, "you must use a write token to upload to a repository of this name")
        return Repository(path)

    def _key(self, kind: str, name: str, oid: str) -> str:
        return hmac.new(self.secret, f"{kind}/{name}/{oid}".encode(), "sha256").hexdigest()

    # what is asked

    async def whoami(self, request: Request) -> Response:
        user = self.user(request)
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        role = {"accessToken": {"displayName": "test", "role": "write" if user["write"] else "read"}}
        return JSONResponse({"type": "user", "name": user["name"], "orgs": [], "auth": {"type": "access_token"} | role})

    async def create(self, request: Request) -> Response:
        user, wanted = self.user(request), await request.json()
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        owner, kind = wanted.get("organization") or user["name"], wanted.get("type") or "model"
        if owner != user["name"] or not user["write"]:
            raise Refused(403, None, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        url = f"{request.base_url}{'' if kind == 'model' else kind + 's/'}{name}"
        if (path := self.at(f"{kind}s", name)).is_dir():
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        Repository.create(path, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        return JSONResponse({"url": url, "name": name})

    async def validate(self, request: Request) -> Response:
        try:
            found = metadata((await request.json())["content"])
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        problems = list(problems_of(found)) if found else []
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": [{"message": p} for p in problems], "warnings": warnings}, 400 if problems else 200)

    async def info(self, request: Request, kind: str, name: str, revision: str = "main") -> Response:
        repository = self.repository(request, kind, name)
        sha, entries = repository.resolve(revision), repository.entries(revision, "-r")
        card = metadata(repository.blob(entries["README.md"].oid).decode()) if "README.md" in entries else None
        date = repository.git("show", "-s", "--format=%cd", "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z", sha, TZ="UTC")
        return JSONResponse(
            {
                "_id": hashlib.sha256(name.encode()).hexdigest()[:24], "id": name, "author": name.partition("/")[0], "sha": sha,
                "private": repository.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
                "lastModified": date.decode().strip(), "createdAt": date.decode().strip(), "cardData": card,
                "siblings": [{"rfilename": path} for path in entries],
            }
        )  # fmt: skip

    async def refs(self, request: Request, kind: str, name: str) -> Response:
        found = self.repository(request, kind, name).branches()
        branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in found.items()]
        return JSONResponse({"branches": branches, "converts": [], "tags": []})

    async def branch(self, request: Request, kind: str, name: str, branch: str) -> Response:
        repository = self.repository(request, kind, name, write=True)
        if branch in repository.branches():
            raise Refused(409, None, "Reference already exists")
        start = (await request.json()).get("startingPoint", "main") if await request.body() else "main"
        repository.git("update-ref", f"refs/heads/{branch}", repository.resolve(start))
        return Response(status_code=201)

    async def tree(self, request: Request, kind: str, name: str, revision: str, under: str = "") -> Response:
        deep = request.query_params.get("recursive", "").lower() in ("true", "1")
        entries = self.repository(request, kind, name).entries(revision, "-r", "-t")
        inside = {p: e for p, e in entries.items() if p.startswith(f"{under}/" if under else "")}
        if under and not inside:
            raise Refused(404, "EntryNotFound", f"{under} does not exist on {revision}")
        level = under.count("/") + 1 if under else 0
        return JSONResponse([e.json() for p, e in inside.items() if deep or p.count("/") == level])

    async def paths(self, request: Request, kind: str, name: str, revision: str) -> Response:
        entries = self.repository(request, kind, name).entries(revision, "-r", "-t")
        form = (await request.form()).getlist("paths")
        wanted = form or (await request.json())["paths"]
        return JSONResponse([entries[path].json() for path in wanted if path in entries])

    async def preupload(self, request: Request, kind: str, name: str, revision: str) -> Response:
        repository = self.repository(request, kind, name, write=True)
        entries, patterns = repository.entries(revision, "-r"), [line.split()[0] for line in _LARGE.splitlines()]
        answers = []
        for file in (await request.json())["files"]:
            large = any(fnmatch.fnmatch(Path(file["path"]).name, pattern) for pattern in patterns)
            large = large or b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10 << 20
            there = entries.get(file["path"])
            oid = (there.large[0] if there.large else there.oid) if there else None
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answers})

    async def batch(self, request: Request, kind: str, name: str) -> Response:
        repository, objects = self.repository(request, kind, name, write=True), []
        for wanted in (await request.json())["objects"]:
            oid = wanted["oid"]
            link = f"{request.base_url}{kind}/{name}/objects/{oid}?{urlencode({'key': self._key(kind, name, oid)})}"
            actions = {"upload": {"href": link}, "verify": {"href": link.replace("/objects/", "/verify/")}}
            there = repository.large(oid).is_file()
            objects.append({"oid": oid, "size": wanted["size"]} | ({} if there else {"actions": actions}))
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def put(self, request: Request, kind: str, name: str, oid: str) -> Response:
        if request.query_params.get("key") != self._key(kind, name, oid):
            raise Refused(403, None, "the signature does not match")
        place, digest = Repository(self.at(kind, name)).large(oid), hashlib.sha256()
        beside = place.with_name(f"{oid}.{time.monotonic_ns()}.part")
        try:
            with beside.open("wb") as file:
                async for block in request.stream():
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != oid:
                raise Refused(400, None, f"the content has the sha256 {digest.hexdigest()}, not {oid}")
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
        return Response()

    async def verify(self, request: Request, kind: str, name: str, oid: str) -> Response:
        asked, file = await request.json(), Repository(self.at(kind, name)).large(oid)
        if request.query_params.get("key") != self._key(kind, name, oid) or asked["oid"] != oid:
            raise Refused(403, None, "the signature does not match")
        if not file.is_file() or file.stat().st_size != asked["size"]:
            raise Refused(404, None, "the object is not there")
        return Response()

    async def commit(self, request: Request, kind: str, name: str, branch: str) -> Response:
        repository = self.repository(request, kind, name, write=True)
        head, added, deleted = repository.resolve(branch), {}, []
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        title, parent = lines[0]["value"]["summary"], lines[0]["value"].get("parentCommit")
        if parent and parent != head:
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                file = repository.large(value["oid"])
                if not file.is_file() or file.stat().st_size != value["size"]:
                    raise Refused(400, None, f"the LFS object of {value['path']} was not uploaded")
                text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
                added[value["path"]] = text.encode()
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
            else:
                raise Refused(400, None, f"this Hub knows no {line['key']}")
        made = repository.commit(branch, head, title, added, deleted)
        url = f"{request.base_url}{'' if kind == 'models' else kind + '/'}{name}/commit/{made}"
        return JSONResponse({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    async def resolve(self, request: Request, kind: str, name: str, revision: str, path: str) -> Response:
        repository = self.repository(request, kind, name)
        entry = repository.entries(revision, "-r").get(path)
        headers = {"X-Repo-Commit": repository.resolve(revision)}
        if entry is None:
            missing = Refused(404, "EntryNotFound", f"{path} does not exist on {revision}").response()
            missing.headers.update(headers)
            return missing
        if entry.large is None:
            return Response(repository.blob(entry.oid), headers=headers | {"ETag": f'"{entry.oid}"'})
        sha256, size = entry.large
        headers |= {"ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size)}
        return FileResponse(repository.large(sha256), headers=headers)

    async def fault(self, request: Request) -> Response:
        self.faults[:] = await request.json()
        self.released.set()
        self.released = asyncio.Event()
        return Response()


_KIND = r"(?P<kind>models|datasets|spaces)"
_PLAIN = r"(?:(?P<kind>datasets|spaces)/)?"
ROUTES: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
    ("POST", r"/faults", Protocol.fault),
    ("GET", r"/api/whoami-v2", Protocol.whoami),
    ("POST", r"/api/repos/create", Protocol.create),
    ("POST", r"/api/validate-yaml", Protocol.validate),
    ("GET", rf"/api/{_KIND}/(?P<name>{_ID})", Protocol.info),
    ("GET", rf"/api/{_KIND}/(?P<name>{_ID})/revision/(?P<revision>[^/]+)", Protocol.info),
    ("GET", rf"/api/{_KIND}/(?P<name>{_ID})/refs", Protocol.refs),
    ("POST", rf"/api/{_KIND}/(?P<name>{_ID})/branch/(?P<branch>[^/]+)", Protocol.branch),
    ("GET", rf"/api/{_KIND}/(?P<name>{_ID})/tree/(?P<revision>[^/]+)(?:/(?P<under>.*))?", Protocol.tree),
    ("POST", rf"/api/{_KIND}/(?P<name>{_ID})/paths-info/(?P<revision>[^/]+)", Protocol.paths),
    ("POST", rf"/api/{_KIND}/(?P<name>{_ID})/preupload/(?P<revision>[^/]+)", Protocol.preupload),
    ("POST", rf"/api/{_KIND}/(?P<name>{_ID})/commit/(?P<branch>[^/]+)", Protocol.commit),
    ("POST", rf"/{_PLAIN}(?P<name>{_ID})\.git/info/lfs/objects/batch", Protocol.batch),
    ("PUT", rf"/{_KIND}/(?P<name>{_ID})/objects/(?P<oid>\w+)", Protocol.put),
    ("POST", rf"/{_KIND}/(?P<name>{_ID})/verify/(?P<oid>\w+)", Protocol.verify),
    ("GET", rf"/{_PLAIN}(?P<name>{_ID})/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Protocol.resolve),
]


def metadata(text: str) -> Any:
    """The YAML at the head of a card."""
    found = re.match(r"---\r?\n(.*?)^---\r?$", text, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def problems_of(card: Any) -> Iterator[str]:
    """What the Hub refuses in a model card's metadata."""
    if not isinstance(card, dict):
        yield "YAML metadata must be a mapping"
        return
    for key in ("base_model", "datasets"):
        named = card.get(key) or []
        for name in [named] if isinstance(named, str) else named:
            if not re.fullmatch(rf"{_ID}|[\w.-]+", str(name)):
                yield f'"{key}" with value "{name}" is not valid. Use a model id from https://hf.co/models'
    for key in ("license", "library_name", "pipeline_tag"):
        if key in card and not re.fullmatch(r"[a-z0-9.-]+", str(card[key])):
            yield f'"{key}" must be one of the known words'
    if "tags" in card and not all(isinstance(tag, str) for tag in card["tags"]):
        yield '"tags" must be a list of strings'
    for number, model in enumerate(card.get("model-index", [])):
        where = f'"model-index[{number}]'
        if not isinstance(model.get("name"), str) or not model.get("results"):
            yield f'{where}" needs a name and results'
        for result in model.get("results") or []:
            if not isinstance(result.get("task", {}).get("type"), str):
                yield f'{where}.results.task.type" is required'
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                yield f'{where}.results.dataset" needs type and name'
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
                    yield f'{where}.results.metrics" needs type and a number as value'


# --- serving, and failing on request ---------------------------------------------------------------------------------


def application(protocol: Protocol) -> Callable[..., Awaitable[None]]:
    """The protocol as an ASGI application that writes down every request and commits the faults that were asked for.

    A fault is {"method", "path" (a pattern), "do", "after" (bytes of the body), "times", "skip" (requests)}. `do` is a status
    to answer, or `cut` (close the connection), `stall` (until other faults, or none, are asked for), `die` (end the process),
    or `mute` (do what is asked and close without an answer).
    """
    log = protocol.folder / "requests.jsonl"

    async def served(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path, method = scope["raw_path"].decode(), scope["method"].replace("HEAD", "GET")
        fault = next((f for f in protocol.faults if f["method"] == method and re.search(f["path"], path)), None)
        if fault is not None and fault.get("skip", 0):
            fault["skip"] -= 1
            fault = None
        if fault is not None:
            fault["times"] = fault.get("times", 1) - 1
            protocol.faults[:] = [f for f in protocol.faults if f.get("times", 1) > 0]
        wrong, after, bytes_in, status = (fault or {}).get("do"), (fault or {}).get("after", 0), 0, 0
        transport = receive.__self__.transport

        async def heard() -> Any:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            if bytes_in > after and wrong == "cut":
                transport.abort()
                return {"type": "http.disconnect"}
            if bytes_in > after and wrong == "stall":
                await protocol.released.wait()
            if bytes_in > after and wrong == "die":
                os._exit(1)
            return message

        async def said(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if wrong == "mute":
                transport.abort()
                return
            await send(message)

        request = Request(scope, heard)
        try:
            asked = Refused(wrong, None, "as was asked for") if isinstance(wrong, int) else None
            response = asked.response() if asked else await _answer(protocol, request, method, path)
        except Refused as refused:
            response = refused.response()
        except ClientDisconnect:
            response = Response(status_code=499)
        if scope["method"] == "HEAD":
            response.headers.setdefault("Content-Length", "0")
        await response(scope, heard, said)
        with log.open("a") as file:
            line = {"method": scope["method"], "path": path, "status": status, "bytes": bytes_in}
            file.write(json.dumps(line) + "\n")

    return served


async def _answer(protocol: Protocol, request: Request, method: str, path: str) -> Response:
    for wanted, pattern, function in ROUTES:
        if method == wanted and (found := re.fullmatch(pattern, path)):
            given = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
            if "kind" in found.groupdict():
                given.setdefault("kind", "models")
            return await function(protocol, request, **given)
    raise Refused(404, None, f"this Hub has no {method} {path}")


# --- for tests -------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A Hub in a process of its own. `alice` and `bob` have accounts; alice has a token that only reads, too."""

    folder: Path
    token: str = "hf_alicesTokenThatMayWriteXXXXXXXXXXXX"  # noqa: S105  # nobody's
    reads: str = "hf_alicesTokenThatOnlyReadsXXXXXXXXXXX"
    bobs: str = "hf_bobsTokenThatMayWriteXXXXXXXXXXXXXX"

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        users = {
            self.token: {"name": "alice", "write": True},
            self.reads: {"name": "alice", "write": False},
            self.bobs: {"name": "bob", "write": True},
        }
        (self.folder / "tokens.json").write_text(json.dumps(users))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.stop()
        self.process = subprocess.Popen([sys.executable, __file__, str(self.folder), str(self.port)])
        until = time.monotonic() + 30
        while time.monotonic() < until and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError("the Hub did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """What makes a client in a process of its own talk to this Hub, with caches in a folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def fail(self, *faults: dict[str, Any]) -> None:
        asked = urllib.request.Request(f"{self.url}/faults", json.dumps(faults).encode())  # noqa: S310  # our own
        urllib.request.urlopen(asked).close()  # noqa: S310

    def requests(self, method: str = "", path: str = "") -> list[dict[str, Any]]:
        log = self.folder / "requests.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if method in line["method"] and re.search(path, line["path"])]

    def repository(self, name: str, kind: str = "models") -> Repository:
        return Repository(self.folder / "git" / kind / f"{name}.git")

    def commits(self, name: str) -> list[str]:
        return self.repository(name).git("log", "--format=%s", "main").decode().splitlines()

    def files(self, name: str, revision: str = "main") -> dict[str, Entry]:
        return self.repository(name).entries(revision, "-r")

    def read(self, name: str, path: str) -> bytes:
        repository, entry = self.repository(name), self.files(name)[path]
        return repository.large(entry.large[0]).read_bytes() if entry.large else repository.blob(entry.oid)


if __name__ == "__main__":
    import uvicorn

    serve = functools.partial(uvicorn.run, host="127.0.0.1", log_level="error", timeout_graceful_shutdown=1)
    serve(application(Protocol(Path(sys.argv[1]))), port=int(sys.argv[2]))
