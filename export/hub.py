"""Checkpoints on the Hugging Face hub: JSON, text and safetensors files of one commit, by the hub's cache.

`HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rt.errors import CheckpointError
from rt.export.facts import FOLDERS, components
from rt.export.folder import TOKENIZERS, Folder, choose_weights, open_folder, refuse_code
from rt.export.weights import one_line, read_json

_FACTS = (
    "model_index.json",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
    "OFL*",
    "scheduler/scheduler_config.json",
    *(f"{folder}/*.json" for folder in (*FOLDERS.values(), *TOKENIZERS.values())),
    *(f"{folder}/*.txt" for folder in TOKENIZERS.values()),
)


def open_hub(repo: str, revision: str | None, variant: str | None, offline: bool) -> Folder:
    """Download what rt reads of a repository, unless the cache has it, and open it as a folder.

    Raises:
        CheckpointError: The hub or the repository cannot be reached, or `open_folder` refuses it.
        PickleError: A component has no weights but pickles.
    """
    if offline or constants.HF_HUB_OFFLINE:
        # Whoever fetched it left out what they did not need, which is no fault: `open_folder` says what rt lacks.
        root = download(repo, ["model_index.json"], revision=revision, offline=True)
        return replace(open_folder(root, variant), revision=root.name)

    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    refuse_code(names, repo)
    if "model_index.json" not in names:
        raise CheckpointError(
            f"{repo} has no model_index.json: expected a text-to-image model in diffusers' layout"
        )
    root = download(repo, _FACTS, revision=info.sha)
    parts = components({"model_index": read_json(root / "model_index.json")}, repo)
    folders = dict.fromkeys(FOLDERS[part] for part in parts)
    chosen = choose_weights(root, folders, names, variant)
    weights = [path for component in chosen.values() for path in component.files()]
    download(repo, [path.relative_to(root).as_posix() for path in weights], revision=info.sha)
    return replace(open_folder(root, variant), revision=info.sha)


def download(
    repo: str, patterns: Sequence[str], *, revision: str | None = None, offline: bool = False
) -> Path:
    """The folder of one commit in the hub's cache, with the repository's files that match `patterns`.

    Raises:
        CheckpointError: The files are not to be had; says why and what to do.
    """
    with _explained(repo, revision):
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), local_files_only=offline
            )
        )


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except GatedRepoError:
        problem = f"is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "is neither a folder here nor a repository on the hub (a private one needs HF_TOKEN)"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the hub"
    except LocalEntryNotFoundError:
        problem = (
            f"is not in the hub's cache {constants.HF_HUB_CACHE}, or not whole: run once without --offline"
        )
    except Exception as error:  # Whatever the network, a proxy or the disk does.
        problem = f"cannot be had from the hub ({one_line(error)}); --offline uses the cache alone"
    else:
        return
    raise CheckpointError(f"{repo} {problem}")
