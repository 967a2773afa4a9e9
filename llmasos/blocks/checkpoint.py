"""A model's weights where they lie: names, shapes and bytes, read one tensor at a time.

`Checkpoint` is what loading needs of them; here for safetensors files, in `llmasos.blocks.gguf_file` for GGUF. Every
file is checked against its own header before the first tensor is read, so that a truncated download is named.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from llmasos.errors import CheckpointError

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors format itself."""
_SAMPLE_BYTES = 4096
"""How much of each tensor goes into a digest: enough to tell checkpoints apart, little enough to read at start."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """Weights on disk, or on their way there."""

    def names(self, model: Any) -> Mapping[str, str]:
        """Name of every tensor -> name of the parameter of `model` that it goes into (or goes into first)."""

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors in the files. May fetch the files that hold them."""

    def state(self, model: Any, names: Iterable[str]) -> dict[str, Any]:
        """These tensors under the names that transformers loads them by; read when they are indexed.

        After `names` was called with the whole model; here it may be cut already.
        """

    def where(self) -> str:
        """The files, for messages."""


class LazyTensor:
    """A tensor that is read when it is indexed with `...`, as transformers does."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


def read_bytes(stored: Stored) -> torch.Tensor:
    """The bytes of one tensor, uint8, in memory of their own."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        view, done = memoryview(raw.numpy()), 0  # type: ignore[arg-type]
        while done < stored.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{stored.file} ends before byte {stored.offset + stored.nbytes}")
            done += count
    return raw


class SafetensorsFiles:
    """One or several safetensors files that are here already."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stored: dict[str, Stored] = {}
        for file in files:
            self._stored.update(read_header(file))

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor, by its name."""
        return self._stored

    def names(self, model: Any) -> Mapping[str, str]:
        return renamed(model, self._stored)

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self._stored[name].nbytes for name in names)

    def state(self, model: Any, names: Iterable[str]) -> dict[str, Any]:
        return {name: LazyTensor(partial(stored_tensor, name, self._stored[name])) for name in names}

    def where(self) -> str:
        return ", ".join(sorted({str(stored.file) for stored in self._stored.values()}))


def stored_tensor(name: str, stored: Stored) -> torch.Tensor:
    """Read one tensor of a safetensors file."""
    dtype = _TORCH_DTYPES.get(stored.dtype)
    if dtype is None:
        raise CheckpointError(f"tensor {name} in {stored.file} is of type {stored.dtype}, which is not read here")
    return read_bytes(stored).view(dtype).reshape(stored.shape)


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file says is in it. Raises CheckpointError when that cannot be, or bytes are missing."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{file} is not a safetensors file: it has {size} bytes")
            (length,) = struct.unpack("<Q", start)
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is not a safetensors file, or is truncated inside its header")
            header = json.loads(stream.read(length))
        return {
            name: _entry(file, size, 8 + length, name, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header is damaged ({error})") from error


def _entry(file: Path, size: int, base: int, name: str, entry: dict[str, Any]) -> Stored:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    dtype = _TORCH_DTYPES.get(entry["dtype"])
    if not 0 <= begin <= end or (dtype is not None and end - begin != prod(shape) * dtype.itemsize):
        raise CheckpointError(f"tensor {name} in {file} has a shape that does not match its bytes")
    if base + end > size:
        raise CheckpointError(
            f"{file} is truncated: tensor {name} ends at byte {base + end}, the file at {size}",
            hint="download or copy it again",
        )
    return Stored(file, base + begin, end - begin, str(entry["dtype"]), shape)


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint names -> names of parameters of `model`, by transformers' own rules for the family."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    found = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:  # as transformers: it should not have been renamed
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        found[name] = target
    return found


def digest(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> str:
    """Identifies the content of a checkpoint, whoever reads whichever part of it.

    Over the config and, for every tensor, its name, shape, type and first bytes. Equal for equal files anywhere.
    """
    state = hashlib.sha256(canonical(config))
    by_file: dict[Path, list[str]] = {}
    for name, entry in stored.items():
        by_file.setdefault(entry.file, []).append(name)
    samples: dict[str, bytes] = {}
    for path, names in by_file.items():
        with path.open("rb") as file:
            for name in names:
                file.seek(stored[name].offset)
                samples[name] = file.read(min(_SAMPLE_BYTES, stored[name].nbytes))
    for name in sorted(stored):
        entry = stored[name]
        state.update(f"\n{name} {entry.dtype} {list(entry.shape)}\n".encode())
        state.update(samples[name])
    return state.hexdigest()


def canonical(config: Mapping[str, Any]) -> bytes:
    """A config as bytes that depend on its content only. What names the checkpoint or this library is left out."""
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return json.dumps(kept, sort_keys=True, default=str).encode()
