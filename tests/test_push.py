"""Publishing to a hub on the loopback: what arrives, what is refused before anything is sent, what the hub says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.hub import COMMIT, Repository
from fakes.hub_uploads import UploadHub
from quantkit import __version__, jobs
from quantkit.manifest import file_record, read_manifest, write_manifest
from quantkit.progress import Progress

TOKEN = "hf_writer"


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact, which each test gets a copy of."""
    out = tmp_path_factory.mktemp("artifacts") / "nf4"
    jobs.quantize(
        "nf4-double",
        model=str(tiny_llama),
        out=out,
        settings=["method.block_size=64"],
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "artifact")
    (tmp_path / "artifact" / "notes.txt").write_text("not part of the artifact")
    return tmp_path / "artifact"


def push(
    artifact: Path, repo_id: str, hub: UploadHub | str, *options: str, token: str | None = TOKEN, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, which knows no hub but this one."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()}
    environment = {
        **ours,
        "HF_HOME": str(artifact.parent / "home"),
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",  # the protocol of the fake is that of LFS, which every hub takes
        **({"HF_TOKEN": token} if token else {}),
    }
    command = [sys.executable, "-m", "quantkit", "push", str(artifact), repo_id, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def contents(artifact: Path) -> dict[str, bytes]:
    """What the manifest lists, and the manifest."""
    manifest = read_manifest(artifact)
    assert manifest is not None
    names = [*(record.name for record in manifest.files), "quantkit.json"]
    return {name: (artifact / name).read_bytes() for name in names}


def test_an_artifact_arrives_byte_for_byte(artifact: Path) -> None:
    with UploadHub({}, writers={TOKEN: ("acme",)}) as hub:
        done = push(artifact, "acme/tiny", hub, "--private", "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["url"] == f"{hub.endpoint}/acme/tiny" and said["commit"] == COMMIT
    repository = hub.repositories["acme/tiny"]
    arrived = {name: content for name, content in repository.files.items() if name != ".gitattributes"}
    assert arrived == contents(artifact), "and nothing that the manifest does not list"
    assert sorted(said["files"]) == sorted(arrived) and said["bytes"] == sum(map(len, arrived.values()))
    assert repository.private
    assert hub.messages == [f"nf4 double-quant by quantkit {__version__}"]
    asked = zip(hub.requests, hub.tokens, strict=True)
    sent = {token for (method, path), token in asked if method != "PUT" and ("repos" in path or "acme/tiny" in path)}
    assert sent == {f"Bearer {TOKEN}"}
    assert ("PUT", f"/storage/{file_record(artifact / 'model.safetensors', artifact).sha256}") in hub.requests


def test_a_second_push_replaces_what_the_first_one_left(artifact: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(artifact, first)
    manifest = read_manifest(first)
    assert manifest is not None
    for name in ("NOTICE.old", "old.txt"):
        (first / name).write_text("of the first one")
        manifest.files.append(file_record(first / name, first))
    write_manifest(manifest, first)
    with UploadHub({}, writers={TOKEN: ("acme",)}) as hub:
        done = push(first, "acme/tiny", hub)
        assert done.returncode == 0, done.stderr
        hub.repositories["acme/tiny"].files["mine.md"] = b"added on the hub"
        done = push(artifact, "acme/tiny", hub, "--message", "smaller", "--json")
        assert done.returncode == 0, done.stderr
    kept = {".gitattributes": b"", "mine.md": b"added on the hub"}
    assert hub.repositories["acme/tiny"].files == contents(artifact) | kept
    assert sorted(json.loads(done.stdout)["deleted"]) == ["NOTICE.old", "old.txt"]
    assert hub.messages[1] == "smaller"


def test_a_branch_is_made_and_main_stays_as_it_is(artifact: Path) -> None:
    original = {"model.safetensors": b"original", "config.json": b"theirs"}
    repository = Repository({"README.md": b"theirs"})
    with UploadHub({"acme/tiny": repository}, writers={TOKEN: ("acme",)}) as hub:
        done = push(artifact, "acme/tiny", hub, "--revision", "w4")
        assert done.returncode == 0, done.stderr
        assert f"{hub.endpoint}/acme/tiny/tree/w4" in done.stdout
        assert repository.files == {"README.md": b"theirs"}
        assert repository.branches["w4"] == contents(artifact)
        repository.files.update(original)
        refused = push(artifact, "acme/tiny", hub)
    assert refused.returncode == 2 and "holds weights that quantkit did not push: model.safetensors" in refused.stderr
    assert repository.files == {"README.md": b"theirs", **original}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_an_unverified_artifact_is_refused_before_anything_is_sent(damage: str, artifact: Path) -> None:
    weights = artifact / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (artifact / "quantkit.json").unlink()
    with UploadHub({}, writers={TOKEN: ("acme",)}) as hub:
        done = push(artifact, "acme/tiny", hub, "--json")
    assert done.returncode == 6 and hub.requests == []
    assert ("quantkit.json" if damage == "manifest" else "model.safetensors") in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "VerificationError"


def test_an_edited_card_names_the_way(artifact: Path) -> None:
    (artifact / "README.md").write_text("---\na: b\n---\nmine\n")
    with UploadHub({}, writers={TOKEN: ("acme",)}) as hub:
        done = push(artifact, "acme/tiny", hub)
    assert done.returncode == 6 and f"hint: quantkit card {artifact}" in done.stderr


def test_a_manifest_cannot_reach_outside_its_folder(artifact: Path) -> None:
    path = artifact / "quantkit.json"
    document: dict[str, Any] = json.loads(path.read_text())
    (artifact.parent / "secret").write_bytes(b"secret")
    record = file_record(artifact.parent / "secret", artifact.parent).model_dump()
    document["files"].append({**record, "name": "../secret"})
    path.write_text(json.dumps(document))
    with UploadHub({}, writers={TOKEN: ("acme",)}) as hub:
        done = push(artifact, "acme/tiny", hub)
    assert done.returncode == 6 and "../secret" in done.stderr and hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "options", "token", "code", "message", "hint"),
    [
        ("acme/tiny", [], "hf_unknown", 3, "does not know this token (401)", "HF_TOKEN"),
        ("other/tiny", [], TOKEN, 3, "no right to write there (403)", "role write"),
        ("acme/public", ["--private"], TOKEN, 2, "exists and is public", "another id"),
        ("acme/broken", [], TOKEN, 3, "acme/broken (main): its quantkit.json cannot be read", "another repository"),
        ("acme/tiny", [], None, 3, "no token for the hub", "hf auth login"),
        ("tiny", [], TOKEN, 2, "tiny: not the id of a repository", "OWNER/NAME"),
    ],
)
def test_what_is_refused_is_one_message_with_a_hint(
    repo_id: str, options: list[str], token: str | None, code: int, message: str, hint: str, artifact: Path
) -> None:
    repositories = {"acme/public": Repository({}), "acme/broken": Repository({"quantkit.json": b"no manifest"})}
    with UploadHub(repositories, writers={TOKEN: ("acme",)}) as hub:
        done = push(artifact, repo_id, hub, *options, token=token)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(lines) == 2 and message in lines[0] and "Traceback" not in done.stderr
    assert hint in lines[1]
    assert repositories["acme/public"].files == {} and hub.messages == []


def test_storage_that_refuses_leaves_no_commit(artifact: Path) -> None:
    with UploadHub({}, writers={TOKEN: ("acme",)}, refused_objects=True) as hub:
        done = push(artifact, "acme/tiny", hub)
    assert done.returncode == 3 and "acme/tiny: " in done.stderr and "Traceback" not in done.stderr
    assert hub.messages == []


def test_offline_and_without_a_network(artifact: Path) -> None:
    with UploadHub({}, writers={TOKEN: ("acme",)}) as hub:
        offline = push(artifact, "acme/tiny", hub, offline="1")
        endpoint = hub.endpoint
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set: nothing can be pushed" in offline.stderr
    assert hub.requests == []
    down = push(artifact, "acme/tiny", endpoint)
    assert down.returncode == 3 and "acme/tiny: the hub cannot be reached" in down.stderr
    assert "Traceback" not in down.stderr
