"""Checkpoints on the Hugging Face hub: JSON, text and safetensors files of one commit, by the hub's cache.

`HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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

from rt.checkpoint_file import read_json
from rt.errors import CheckpointError
from rt.export.facts import FOLDERS, components
from rt.export.folder import TOKENIZERS, Folder, choose_weights, open_folder, refuse_code
from rt.export.one_line import one_line

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


def open_hub(
    repo: str, revision: str | None, variant: str | None, offline: bool, elsewhere: Collection[str] = ()
) -> Folder:
    """Download what rt reads of a repository, unless the cache has it, and open it as a folder; see `open_folder`.

    Raises:
        CheckpointError: The hub or the repository cannot be reached, or `open_folder` refuses it.
        PickleError: A component has no weights but pickles.
    """
    if is_offline(offline):
        # Whoever fetched it left out what they did not need, which is no fault: `open_folder` says what rt lacks.
        root = download(repo, ["model_index.json"], revision=revision, offline=True)
        return replace(open_folder(root, variant, elsewhere), revision=root.name)

    commit, names = look_up(repo, revision)
    refuse_code(names, repo)
    if "model_index.json" not in names:
        raise CheckpointError(
            f"{repo} has no model_index.json: expected a text-to-image model in diffusers' layout"
        )
    root = download(repo, _FACTS, revision=commit)
    parts = components({"model_index": read_json(root / "model_index.json")}, repo, elsewhere)
    folders = [folder for folder in dict.fromkeys(FOLDERS[part] for part in parts) if folder not in elsewhere]
    chosen = choose_weights(root, folders, names, variant)
    weights = [path for component in chosen.values() for path in component.files()]
    download(repo, [path.relative_to(root).as_posix() for path in weights], revision=commit)
    return replace(open_folder(root, variant, elsewhere), revision=commit)


def is_offline(asked: bool) -> bool:
    """Whether only the cache may be used: it was asked for, or the environment says so."""
    return asked or bool(constants.HF_HUB_OFFLINE)


def look_up(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that `revision` means on the hub, and the names of its files.

    Raises:
        CheckpointError: The hub or the repository cannot be reached.
    """
    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision)
    return str(info.sha), [file.rfilename for file in info.siblings or ()]


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
