"""A hub on the loopback that takes uploads too: repositories, branches, LFS objects and commits."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from fakes.hub import COMMIT, FakeHub, Repository

LARGE = (".safetensors", ".gguf")


def answer(document: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(document).encode()


def refusal(status: int, message: str, code: str = "") -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return status, headers, b""


@dataclass
class UploadHub(FakeHub):
    """writers: token -> owners in whose names it may write; any other token is unknown. messages: of the commits."""

    writers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refused_objects: bool = False  # storage answers 500

    def _find(self, method: str, path: str, posted: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        if method == "PUT":  # the address is the permission: no token comes along
            return self._put(path.rpartition("/")[2], posted)
        if token not in self.writers:
            return refusal(401, "Invalid credentials in Authorization header")
        words = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self._validate(json.loads(posted))
        if path == "/api/repos/create":
            return self._create(json.loads(posted), self.writers[token])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(posted))
        if method == "POST" and words[4:5] in (["branch"], ["preupload"], ["commit"]):
            name, verb, branch = "/".join(words[2:4]), words[4], words[5]
            if words[2] not in self.writers[token]:
                return refusal(403, "You don't have the rights")
            if name not in self.repositories:
                return refusal(404, "Repository not found", "RepoNotFound")
            return getattr(self, f"_{verb}")(self.repositories[name], branch, posted)  # type: ignore[no-any-return]
        return super()._find(method, path, posted, token)

    def _validate(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        head = yaml.safe_load(asked["content"].split("---\n")[1])
        wrong = [] if isinstance(head, dict) else [{"message": "not a mapping"}]
        return answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def _create(self, asked: dict[str, Any], owners: tuple[str, ...]) -> tuple[int, dict[str, str], bytes]:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in owners:
            return refusal(403, "You don't have the rights to create a model under this namespace")
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            return answer({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[name] = Repository({".gitattributes": b""}, private=private, readers=tuple(self.writers))
        return answer({"url": url})

    def _branch(self, repository: Repository, branch: str, posted: bytes) -> tuple[int, dict[str, str], bytes]:
        if repository.at(branch) is not None:
            return answer({"error": "Reference already exists"}, 409)
        repository.branches[branch] = dict(repository.files)
        return answer({})

    def _preupload(self, repository: Repository, branch: str, posted: bytes) -> tuple[int, dict[str, str], bytes]:
        if repository.at(branch) is None:
            return refusal(404, "Invalid rev id", "RevisionNotFound")
        asked = json.loads(posted)["files"]
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"} for file in asked
        ]
        return answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def _batch(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        objects = []
        for wanted in asked["objects"]:
            action = {"upload": {"href": f"{self.endpoint}/storage/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.objects else {**wanted, "actions": action})
        return answer({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, content: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.refused_objects:
            return refusal(400, "the storage is full")
        if hashlib.sha256(content).hexdigest() != oid:
            return refusal(400, "the content does not have this hash")
        self.objects[oid] = content
        return answer({})

    def _commit(self, repository: Repository, branch: str, posted: bytes) -> tuple[int, dict[str, str], bytes]:
        files = repository.at(branch)
        if files is None:
            return refusal(404, "Invalid rev id", "RevisionNotFound")
        for line in posted.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return refusal(400, "the object was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert entry["key"] == "deletedFile", entry["key"]
                del files[value["path"]]
        name = next(name for name, known in self.repositories.items() if known is repository)
        return answer({"commitUrl": f"{self.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
