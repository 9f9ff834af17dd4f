"A hub of one's own: what huggingface_hub's client asks for when it creates, writes and opens."

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class StandIn(ThreadingHTTPServer):
    "Repositories in memory. Weights go by Git LFS (HF_HUB_DISABLE_XET=1), the rest as text."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories, self.objects, self.asked = {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, name, private=True):
        "A repository with an empty branch."
        self.repositories[name] = dict(private=private, branches={"main": {}})

    def files(self, name, branch="main"):
        "Path -> bytes."
        return self.repositories[name]["branches"][branch]

    def environment(self):
        "What a client needs to come here."
        here = dict(HF_ENDPOINT=self.address, HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_nobody")
        return here | dict(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1")


class Answers(BaseHTTPRequestHandler):
    "One request."

    def log_message(self, *_):
        "Nothing is logged."

    def reply(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.server.asked.append(f"GET {self.path}")
        name = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision/")[0]
        if name not in self.server.repositories:
            return self.reply(dict(error="Repository not found"), 404)
        private = self.server.repositories[name]["private"]
        self.reply(dict(id=name, private=private, sha="0" * 40, siblings=[], tags=[]))

    def do_PUT(self):
        self.server.asked.append(f"PUT {self.path}")
        given = self.body()
        if self.path.startswith("/objects/"):
            oid = self.path.removeprefix("/objects/")
            assert hashlib.sha256(given).hexdigest() == oid
            self.server.objects[oid] = given
        else:
            name = self.path.removeprefix("/api/models/").removesuffix("/settings")
            changed = json.loads(given)
            visible = changed.get("visibility") or ("private" if changed["private"] else "public")
            self.server.repositories[name]["private"] = visible == "private"
        self.reply({})

    def do_POST(self):
        self.server.asked.append(f"POST {self.path}")
        path, given = self.path.partition("?")[0], self.body()
        parts = path.removeprefix("/api/models/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(given))
        elif path == "/api/validate-yaml":
            self.reply(dict(errors=[], warnings=[]))
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(given))
        elif parts[2] == "branch":
            self.branch("/".join(parts[:2]), parts[3])
        elif parts[2] == "preupload":
            self.preupload(json.loads(given))
        else:
            assert parts[2] == "commit", path
            self.commit("/".join(parts[:2]), parts[3], given)

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.server.repositories:
            taken = dict(error="You already created this model repo")
            return self.reply(taken | dict(url=f"{self.server.address}/{name}"), 409)
        self.server.add(name, wanted.get("visibility") == "private")
        self.reply(dict(url=f"{self.server.address}/{name}"))

    def branch(self, name, branch):
        branches = self.server.repositories[name]["branches"]
        if branch in branches:
            return self.reply(dict(error="Reference already exists"), 409)
        branches[branch] = dict(branches["main"])
        self.reply({})

    def preupload(self, wanted):
        self.reply(
            dict(
                files=[
                    dict(
                        path=file["path"],
                        uploadMode="lfs" if file["path"].endswith(".safetensors") else "regular",
                        shouldIgnore=False,
                    )
                    for file in wanted["files"]
                ]
            )
        )

    def batch(self, wanted):
        objects = []
        for one in wanted["objects"]:
            action = dict(upload=dict(href=f"{self.server.address}/objects/{one['oid']}"))
            objects.append(dict(oid=one["oid"], size=one["size"], actions=action))
        self.reply(dict(transfer="basic", objects=objects))

    def commit(self, name, branch, given):
        files = self.server.files(name, branch)
        for line in map(json.loads, given.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        where = f"{self.server.address}/{name}/commit/{'1' * 40}"
        self.reply(dict(success=True, commitUrl=where, commitOid="1" * 40))


@contextmanager
def stand_in():
    "The server, while it answers."
    server = StandIn()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
