"""A model from a hub by its id: small files first, weights only when the model is one that can be quantized."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def download_model(
    model_id: str,
    revision: str,
    token: str | None,
    small_files: Sequence[str],
    weight_files: Callable[[Path], Sequence[str]],
) -> tuple[Path, str]:
    """Fetch a model into the hub's own cache; what is there already is not fetched again.

    small_files: patterns of names at the top of the repository. weight_files: is given the folder that holds those,
    says what else is needed, and raises when the model will not do. Returns the folder and the commit.
    HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN count. Raises ModelError.
    """
    folder = fetch_files(model_id, revision, token, small_files)
    commit = folder.name
    weights = weight_files(folder)
    return fetch_files(model_id, commit, token, [*small_files, *weights]), commit


def fetch_files(model_id: str, revision: str, token: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache with a model's files that match; its name is the commit. Raises ModelError.

    patterns: of names at the top of the repository.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(model_id, revision):
        folder = snapshot_download(
            model_id,
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # copies of the weights in other formats, assets
        )
    return Path(folder)


@contextmanager
def hub_errors(model_id: str, revision: str) -> Iterator[None]:
    """Turn what the hub's library raises while a model is asked for into a ModelError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # type: ignore[attr-defined]  # of the HTTP library, which differs between versions
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{model_id} (revision {revision})"
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{where}: access is restricted by its authors",
            hint="accept their terms on the model's page, then set HF_TOKEN to a token of that account",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model_id}: neither a file or folder here nor a model that the hub shows",
            hint="check the spelling; a private model needs HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{model_id}: the hub has no revision {revision}",
            hint="a branch, a tag or a commit of 40 digits; main when left out",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{where}: neither a file or folder here nor complete in the hub's cache, and HF_HUB_OFFLINE is set",
                hint="unset HF_HUB_OFFLINE to download it, or give a local folder or .gguf file",
            ) from error
        raise _unreachable(where, error) from error
    except HFValidationError as error:
        raise ModelError(f"{model_id}: not a hub id: {first_line(error)}", hint="expected OWNER/NAME") from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"{where}: the hub answered {error.response.status_code}: {first_line(error)}",
            hint="try again later; 401 and 403 mean that HF_TOKEN is wrong or lacks the right to read",
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"{where}: no space left in {constants.HF_HUB_CACHE}", hint="set HF_HOME to a folder on another disk"
            ) from error
        raise _unreachable(where, error) from error
    except HTTPError as error:
        raise _unreachable(where, error) from error


def _unreachable(where: str, error: Exception) -> ModelError:
    cause = error.__cause__ or error
    return ModelError(
        f"{where}: neither a file or folder here nor in the hub's cache, and the hub cannot be reached: "
        f"{first_line(cause)}",
        hint="check the network, HF_ENDPOINT and the proxy settings, or give a local folder or .gguf file",
    )


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
