"""Publishes an artifact on a hub: verified first, then all of its files in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import DataError, HubError, UsageError, VerificationError
from quantkit.manifest import MANIFEST_NAME, Manifest, read_manifest
from quantkit.model.front_matter import CARD
from quantkit.model.hub import HUB_ID, first_line
from quantkit.progress import Progress
from quantkit.verification import verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Pushed:
    """What is on the hub now. deleted: files of an earlier artifact that this one does not have."""

    repo_id: str
    revision: str
    commit: str
    url: str
    files: tuple[str, ...]
    bytes: int
    deleted: tuple[str, ...]


def push(
    artifact: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    message: str | None,
    progress: Progress,
) -> Pushed:
    """Upload the files that an artifact's manifest lists, and the manifest, as one commit of a model repository.

    The repository is made when there is none, `private` then; `revision` names a branch, made when there is none. What
    an earlier push left there and this artifact does not have is deleted in the same commit. The token is that of
    HF_TOKEN or of `hf auth login`; HF_ENDPOINT counts. Raises UsageError for what cannot be pushed, VerificationError
    before anything is sent when a file is not what the manifest says, HubError when the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _check_hub(repo_id)
    manifest = _verified(artifact, progress)
    branch = revision or "main"
    api = HfApi()
    files = [*(record.name for record in manifest.files), MANIFEST_NAME]
    with explained(repo_id, branch):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise UsageError(f"{repo_id}: exists and is public, --private was asked for", hint="give another id")
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        stale = _stale(api, repo_id, branch, files)
        size = sum((artifact / name).stat().st_size for name in files)
        progress.say(f"uploading {len(files)} files, {size / 1e6:.1f} MB, to {repo_id}")
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=artifact / name) for name in files),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=message or f"{manifest.method} by quantkit {manifest.quantkit_version}",
            revision=branch,
        )
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{branch}" if branch != "main" else "")
    return Pushed(repo_id, branch, commit.oid, url, tuple(files), size, tuple(stale))


def _verified(artifact: Path, progress: Progress) -> Manifest:
    """The manifest of an artifact whose files are what it says."""
    if not artifact.is_dir():
        raise UsageError(f"{artifact}: no such folder, expected an artifact", hint="quantkit quantize makes one")
    manifest = read_manifest(artifact)
    if manifest is None:
        raise VerificationError(
            f"{artifact}: no {MANIFEST_NAME}, so nothing says what it should hold; not pushed",
            hint="only artifacts that quantkit made can be verified: quantkit quantize",
        )
    progress.say(f"verifying {len(manifest.files)} files")
    findings = verify(artifact).findings
    if findings:
        edited = all(finding.startswith(str(artifact / CARD)) for finding in findings)
        raise VerificationError(
            "\n".join(findings),
            hint=f"quantkit card {artifact} takes an edited card over"
            if edited
            else "not pushed: make the artifact again",
        )
    return manifest


def _check_hub(repo_id: str) -> None:
    """What can be said against a push without a network."""
    from huggingface_hub import constants, get_token

    if not HUB_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id}: not the id of a repository", hint="expected OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set: nothing can be pushed", hint="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise HubError(
            "no token for the hub", hint="set HF_TOKEN to one with the right to write, or log in: hf auth login"
        )


def _stale(api: HfApi, repo_id: str, branch: str, files: Sequence[str]) -> list[str]:
    """What an earlier push left on the branch and this one does not replace.

    Raises UsageError when weights are there that no push of an artifact put there: they would be mixed with these, and
    a reader might take the wrong ones.
    """
    there = set(api.list_repo_files(repo_id, revision=branch))
    earlier = _earlier_files(api, repo_id, branch) if MANIFEST_NAME in there else set()
    foreign = sorted(name for name in there - earlier if name.endswith(WEIGHTS))
    if foreign:
        raise UsageError(
            f"{repo_id} ({branch}): holds weights that quantkit did not push: {', '.join(foreign[:4])}",
            hint="give another repository, or a branch of its own with --revision",
        )
    return sorted((earlier & there) - set(files))


def _earlier_files(api: HfApi, repo_id: str, branch: str) -> set[str]:
    """The files of the artifact that the branch holds now."""
    path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=branch)
    try:
        content: Any = json.loads(Path(path).read_bytes())
        return {str(record["name"]) for record in content["files"]} | {MANIFEST_NAME}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{repo_id} ({branch}): its {MANIFEST_NAME} cannot be read: {error}",
            hint="give another repository, or a branch of its own with --revision",
        ) from error


@contextmanager
def explained(repo_id: str, branch: str) -> Iterator[None]:
    """Turn what the hub answers, or that it does not, into one message."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # type: ignore[attr-defined]  # of the HTTP library, which differs between versions
    )

    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(repo_id, branch, error.response.status_code, error) from error
    except (HTTPError, OSError) as error:
        raise HubError(
            f"{repo_id}: the hub cannot be reached: {_said(error)}",
            hint="check the network, HF_ENDPOINT and the proxy settings; what was uploaded is not sent again",
        ) from error
    except (RuntimeError, ValueError) as error:  # a failed transfer, a card or answer that the client refuses
        raise HubError(f"{repo_id}: the upload failed: {_said(error)}", hint="try again") from error


def _refused(repo_id: str, branch: str, status: int, error: Exception) -> HubError:
    if status == 401:
        return HubError(f"{repo_id}: the hub does not know this token (401)", hint="set HF_TOKEN to a valid one")
    if status == 403:
        return HubError(
            f"{repo_id}: the token has no right to write there (403)",
            hint="check the owner's name; the token needs the role write, in an organization too",
        )
    if status == 404:
        return HubError(f"{repo_id} ({branch}): the hub shows no such repository or branch (404)", hint="check the id")
    return HubError(f"{repo_id}: the hub answered {status}: {_said(error)}", hint="try again later")


def _said(error: Exception) -> str:
    """What the HTTP library says where it is the cause, else the hub's client."""
    return first_line(error.__cause__ or error)
