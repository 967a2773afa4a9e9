"""Models on the Hugging Face hub, or in its cache on this disk: only the files that are needed."""

import json
import re
import socket
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from llmasos.blocks.checkpoint import LazyTensor, Stored, read_header, renamed, stored_tensor
from llmasos.blocks.quiet import quiet
from llmasos.errors import CheckpointError, UnknownModelError

CONNECT_TIMEOUT_S = 5.0
"""A hub that takes longer to connect to is taken to be out of reach, and what is on this disk has to do."""

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` could be the id of a repository: `organisation/name`, or an old name without a slash."""
    return bool(_ID.fullmatch(name)) and not name.endswith((".gguf", ".safetensors", ".bin"))


class _UnreachableError(UnknownModelError):
    """A file is not in the cache, and the hub does not answer."""


class HubFiles:
    """The files of one repository at one revision."""

    def __init__(self, repository: str) -> None:
        self.repository = repository
        self.config_path = self._fetch("config.json", None)
        self.revision = self.config_path.parent.name
        """The commit: the cache keeps every revision in a folder named after it."""

    def get(self, name: str) -> Path | None:
        """The file `name` of this revision, fetched if it is not here; None if there is none, or none can be had."""
        try:
            return self._fetch(name, self.revision)
        except (FileNotFoundError, _UnreachableError):
            return None

    def need(self, name: str, *, bar: Any = None) -> Path:
        """The file `name` of this revision, fetched if it is not here; `bar`, of tqdm's kind, is told how far it is."""
        try:
            return self._fetch(name, self.revision, tqdm_class=bar)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.repository} on the hub has no {name}",
                hint="pickled weights are not read here: take a repository with safetensors",
            ) from error

    def size_bytes(self, name: str) -> int:
        """How large a file of this revision is, whether it is here or not."""
        with quiet():
            return hf_hub_download(self.repository, name, revision=self.revision, dry_run=True).file_size or 0

    def _fetch(self, name: str, revision: str | None, **options: Any) -> Path:
        hint = "try --model smollm2, a directory with config.json and safetensors, or a .gguf file"
        options["local_files_only"] = not _hub_answers()
        try:
            with quiet():
                return Path(hf_hub_download(self.repository, name, revision=revision, **options))
        except (RepositoryNotFoundError, HFValidationError) as error:
            if isinstance(error, GatedRepoError):
                raise UnknownModelError(
                    f"{self.repository} on the hub asks for an account that may read it", hint="type: hf auth login"
                ) from error
            raise UnknownModelError(f"the hub has no repository {self.repository}", hint=hint) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise _UnreachableError(
                f"{name} of {self.repository} is not in the cache of this machine, and the hub cannot be reached",
                hint=hint,
            ) from error
        except EntryNotFoundError as error:
            if revision is not None:
                raise FileNotFoundError(name) from error
            raise UnknownModelError(f"{self.repository} on the hub has no {name}", hint=hint) from error
        except (HfHubHTTPError, OSError) as error:
            raise UnknownModelError(f"{name} of {self.repository} cannot be fetched: {error}", hint=hint) from error


def _hub_answers() -> bool:
    """Whether the hub can be connected to. Its own client would try again for half a minute to find out."""
    hub = urlsplit(constants.ENDPOINT)
    if hub.hostname is None or hub.scheme in getproxies():
        return True  # whoever sits in between has to tell
    try:
        with socket.create_connection(
            (hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), CONNECT_TIMEOUT_S
        ):
            return True
    except OSError:
        return False


class HubCheckpoint:
    """Safetensors on the hub. A file is fetched when a tensor in it is asked for."""

    def __init__(self, files: HubFiles) -> None:
        self._files = files
        self._headers: dict[str, dict[str, Stored]] = {}
        index = files.get("model.safetensors.index.json")
        self._shards: dict[str, str] = weight_map(index) if index is not None else {}
        if index is None:
            self._headers["model.safetensors"] = read_header(files.need("model.safetensors"))
            self._shards = dict.fromkeys(self._headers["model.safetensors"], "model.safetensors")

    def names(self, model: Any) -> Mapping[str, str]:
        return renamed(model, self._shards)

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self._stored(name).nbytes for name in names)

    def state(self, model: Any, names: Iterable[str]) -> dict[str, Any]:
        return {name: LazyTensor(partial(stored_tensor, name, self._stored(name))) for name in names}

    def where(self) -> str:
        return f"{self._files.repository} at {self._files.revision}"

    def _stored(self, name: str) -> Stored:
        shard = self._shards[name]
        if shard not in self._headers:
            self._headers[shard] = read_header(self._files.need(shard))
        if name not in self._headers[shard]:
            raise CheckpointError(f"tensor {name} is not in {shard}, where the index says it is")
        return self._headers[shard][name]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, out of an index file. File names that lead out of the directory are refused."""
    try:
        found = json.loads(index.read_text())["weight_map"]
        shards = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error}") from error
    for file in set(shards.values()):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names the file {file!r}, which is not in its directory")
    return shards
