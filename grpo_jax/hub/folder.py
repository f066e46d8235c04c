"""Model folders: finding one (local path, asset or hub id), reading its JSON, writing one whole.

Nothing is written outside the folder that is asked for, and a written folder appears at once.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.text import strict

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?")
# What a model may consist of; pickles and remote code are never fetched.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_IGNORED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # the same weights once more


def find_folder(path: str | os.PathLike) -> Path:
    """The local folder of `path`: a folder, `asset:NAME`, a hub id, or a .gguf file.

    A .gguf file is converted once, into the cache. A hub id is NAME/NAME, such as `Qwen/Qwen3-4B`,
    or NAME/NAME@REVISION with a branch, tag or commit of it.

    Raises:
      FileNotFoundError: neither a folder nor something that can be fetched.
      ValueError: a file of the model is a link out of the folder.
    """
    from grpo_jax.assets import resolve

    folder = Path(resolve(os.fspath(path))).expanduser()
    if folder.is_dir():
        _check_links(folder)
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        from grpo_jax.hub.gguf import cached_gguf

        return cached_gguf(folder)
    name, revision = split_hub_id(os.fspath(path))
    if not name:
        raise FileNotFoundError(
            f"{path}: no such model folder, and not a hub id (NAME/NAME or NAME/NAME@REVISION) or "
            "asset (asset:NAME)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{path}: no such local folder, and the Hugging Face hub did not give it ({reason}); "
            "check the name and the network, log in for gated models (hf auth login), or download "
            f"it elsewhere (hf download {name} --local-dir FOLDER) and give FOLDER instead"
        ) from error


def split_hub_id(path: str) -> tuple[str, str | None]:
    """NAME/NAME@REVISION -> name and revision, None for the default one; ("", None) if not one."""
    match = _HUB_ID.fullmatch(path)
    return (match[1], match[2]) if match else ("", None)


def read_json(path: Path, default: dict | None = None) -> Any:
    """The content of a JSON file, see text.strict; `default` where there is none.

    Raises:
      FileNotFoundError: no file and no default.
      ValueError: not JSON as `strict.parse_json` takes it.
    """
    if default is not None and not path.exists():
        return default
    try:
        return strict.read_json(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing; is this a Hugging Face model folder?") from error


def read_object(path: Path, default: dict | None = None) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object; ValueError if it holds something else."""
    value = read_json(path, default)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; fetch the file again")
    return value


def _check_links(folder: Path) -> None:
    """Raises ValueError where a file or part of a model is a link to somewhere else.

    A folder from a stranger could make its tokenizer out of any file of this machine, which the
    export would copy. Links into the blobs of a Hugging Face cache are how that cache works.
    """
    entries = [Path(entry) for entry in os.scandir(folder)]
    parts = [path for path in entries if path.is_dir() and not path.is_symlink()]
    entries += [Path(entry) for part in parts for entry in os.scandir(part)]
    for path in entries:
        of_model = any(fnmatch.fnmatch(path.name, pattern) for pattern in _PATTERNS)
        if path.is_symlink() and (of_model or path.is_dir()) and strict.leaves(path, folder):
            raise ValueError(
                f"{path}: a link out of the model folder, to {os.readlink(path)}; copy what it "
                "stands for into the folder"
            )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of `folder` when the block succeeds.

    A model folder that was there is replaced at the end; after an error it is untouched. What a
    kill left beside it is cleared away by the next call.

    Raises:
      ValueError: `folder` exists and is not a model folder.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and _replaceable(folder)):
        raise ValueError(f"{folder}: exists and is not a model folder; choose another or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    if replaced.exists() and not folder.exists():  # killed between the two renames below
        replaced.rename(folder)
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder}: could not be written ({error.strerror}); nothing was changed"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    names = ("config.json", "adapter_config.json")
    return any((folder / name).is_file() for name in names) or not any(folder.iterdir())
