"""A GGUF file: config, tokenizer and weights in one, read without the parts that are not needed.

The `gguf` package's own reader turns every one of 98,000 vocabulary strings into numpy arrays (2.9 s and 160 MB for
the embedded model, measured), and transformers uses it whenever it needs the config. Here the header is walked once,
strings of the vocabulary are stepped over, and transformers gets a slim copy of the header in which they are left
out. What transformers knows about GGUF - how a config is made of metadata, which tensor is which parameter, how
each family's tensors are permuted back - stays its own.
"""

import hashlib
import mmap
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch

from llmasos.blocks.checkpoint import LazyTensor, Stored, read_bytes
from llmasos.blocks.quiet import quiet
from llmasos.errors import CheckpointError, UnsupportedModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_STRING_BYTES = 16 * 2**20
_LONG_ARRAY = 64
"""Arrays of more elements are parts of a vocabulary, not of a config."""
_VOCABULARY = {f"tokenizer.ggml.{part}" for part in ("tokens", "merges", "scores", "token_type")}


@dataclass(slots=True)
class _Header:
    """Everything before the tensors."""

    values: dict[str, Any] = field(default_factory=dict)  # long arrays as their length
    raw: dict[str, tuple[int, int]] = field(default_factory=dict)  # the bytes of each entry, key included
    tensors: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)  # name, dims, type, offset
    end: int = 0


class GgufFile:
    """The tensors and metadata of one GGUF file. Raises CheckpointError when it is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Walker(data).header()
                self._header = header
                self.header_digest = hashlib.sha256(data[: header.end]).hexdigest()
                size = len(data)
                self._slim = _slim_copy(data, header)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, struct.error, IndexError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not a GGUF file, or its header is damaged: {error}") from error
        self._stored = dict(self._entries(size))
        self._known: Mapping[str, str] = {}

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor, by its name in the file."""
        return self._stored

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Keys and values of the header; of a vocabulary only the length."""
        return self._header.values

    def _entries(self, size: int) -> Iterator[tuple[str, Stored]]:
        alignment = int(self.metadata.get("general.alignment", 32))
        base = -(-self._header.end // alignment) * alignment
        for name, dims, kind, offset in self._header.tensors:
            shape = tuple(reversed(dims))
            try:
                quantization = gguf.GGMLQuantizationType(kind)
            except ValueError:
                raise CheckpointError(f"tensor {name} in {self.path} is of the unknown type {kind}") from None
            block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
            nbytes = prod(shape) // block * block_bytes
            if base + offset + nbytes > size:
                end = base + offset + nbytes
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end}, the file at {size}",
                    hint="download or copy it again",
                )
            yield name, Stored(self.path, base + offset, nbytes, quantization.name, shape)

    def config_dict(self) -> dict[str, Any]:
        """The config of a transformers model, as transformers reads it out of the metadata."""
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        self._refuse_unread_parts()
        with self.slim_copy() as slim, quiet():
            try:
                config = cast(dict[str, Any], load_gguf_checkpoint(str(slim), return_tensors=False)["config"])
            except (ValueError, KeyError, IndexError) as error:
                raise UnsupportedModelError(f"{self.path}: {error}") from error
        config.pop("_model_name_or_path", None)
        embedding = self._stored.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"tensor token_embd.weight is missing in {self.path}")
        config["vocab_size"] = embedding.shape[0]
        return config

    def _refuse_unread_parts(self) -> None:
        """Long-context scaling of rotary embeddings is in some files, and transformers does not read it from there."""
        architecture = self.metadata.get("general.architecture")
        scaling = self.metadata.get(f"{architecture}.rope.scaling.type", "none")
        if any(name.startswith("rope_f") for name in self._stored) or scaling not in ("none", ""):
            raise UnsupportedModelError(
                f"{self.path} scales its rotary embedding, which transformers does not read out of GGUF files",
                hint="use the safetensors checkpoint of the model",
            )

    @contextmanager
    def slim_copy(self) -> Iterator[Path]:
        """A GGUF file with the same metadata but no vocabulary and no weights, for as long as the context lasts."""
        with tempfile.TemporaryDirectory(prefix="llmasos-") as folder:
            slim = Path(folder) / self.path.name
            slim.write_bytes(self._slim)
            yield slim

    def names(self, model: Any) -> Mapping[str, str]:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        with quiet():
            known = get_gguf_hf_weights_map(_Shallow(model, 1), self._processor(model))
        self._known = known
        # Experts are listed without a suffix: their parameters in transformers have none.
        found = {name: known.get(name) or known.get(name.removesuffix(".weight")) for name in self._stored}
        lost = sorted(name for name, target in found.items() if target is None)
        if lost:
            raise UnsupportedModelError(
                f"{self.path} holds {lost[0]}, for which transformers' {model.config.model_type} model has no place",
                hint="use the safetensors checkpoint of the model",
            )
        return cast(Mapping[str, str], found)

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self._stored[name].nbytes for name in names)

    def where(self) -> str:
        return str(self.path)

    def _processor(self, model: Any) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        architecture = self.metadata["general.architecture"]
        return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())

    def state(self, model: Any, names: Iterable[str]) -> dict[str, Any]:
        """Tensors that several tensors of the file are merged into are read at once, the others when indexed."""
        processor, mapping = self._processor(model), self._known
        found: dict[str, Any] = {}
        for name in names:
            if _merges(name):
                merged = self._processed(processor, mapping, name, {"tensors": found})
                if merged is not None:
                    found[mapping[name]] = merged
            else:
                found[mapping[name]] = LazyTensor(partial(self._alone, processor, mapping, name))
        return found

    def _alone(self, processor: Any, mapping: Mapping[str, str], name: str) -> torch.Tensor:
        put_aside: dict[str, Any] = {}
        values = self._processed(processor, mapping, name, {"tensors": put_aside})
        return next(iter(put_aside.values())) if values is None else values

    def _processed(
        self, processor: Any, mapping: Mapping[str, str], name: str, parsed: dict[str, Any]
    ) -> torch.Tensor | None:
        """One tensor as float32 in transformers' layout; None when the processor has put it into `parsed` itself."""
        stored = self._stored[name]
        quantization = gguf.GGMLQuantizationType[stored.dtype]
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        raw = read_bytes(stored).numpy()
        if quantization in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            data = raw.view(np.float32 if quantization == gguf.GGMLQuantizationType.F32 else np.float16)
            data = data.reshape(stored.shape)
        else:
            data = raw.reshape(*stored.shape[:-1], stored.shape[-1] // block * block_bytes)
        values = gguf.dequantize(data, quantization)
        result = processor.process(weights=values, name=name, tensor_key_mapping=mapping, parsed_parameters=parsed)
        if result.name is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(result.weights))


class _Shallow:
    """A model whose only child is its base model. transformers makes its table of names anew for every module below
    the one it is given (6 s for 30 blocks); the causal and the base model are the only ones that files are made of."""

    def __init__(self, model: Any, depth: int) -> None:
        self._model = model
        self._depth = depth
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> list[tuple[str, "_Shallow"]]:
        prefix = self._model.base_model_prefix
        base = getattr(self._model, prefix, None)
        return [(prefix, _Shallow(base, self._depth - 1))] if self._depth and base is not None else []


def _merges(name: str) -> bool:
    """Whether several tensors of a file become one parameter, as the gates of experts do."""
    return "_exps" in name or "_projs" in name


class _Walker:
    """Steps through a GGUF header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def header(self) -> _Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version, tensors, entries = self._take("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 are read")
        header = _Header()
        for _ in range(entries):
            begin = self.at
            key = self._string()
            header.values[key] = self._value(self._take("<I")[0])
            header.raw[key] = (begin, self.at)
        for _ in range(tensors):
            name = self._string()
            (count,) = self._take("<I")
            if count > 8:
                raise ValueError(f"tensor {name} has {count} dimensions")
            dims = self._take(f"<{count}Q")
            kind, offset = self._take("<IQ")
            header.tensors.append((name, dims, kind, offset))
        header.end = self.at
        if "general.architecture" not in header.values:
            raise ValueError("it names no architecture")
        return header

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if length > _MAX_STRING_BYTES or self.at + length > len(self.data):
            raise ValueError("a string runs past the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value is of the unknown type {kind}")
        element, count = self._take("<IQ")
        if element in _SCALARS:
            size = struct.calcsize(_SCALARS[element])
            if self.at + size * count > len(self.data):
                raise ValueError("an array runs past the end of the file")
            if count <= _LONG_ARRAY:
                return list(self._take(f"<{count}{_SCALARS[element][1]}"))
            self.at += size * count
            return count
        if element != _STRING:
            raise ValueError("an array holds arrays")
        if count <= _LONG_ARRAY:
            return [self._string() for _ in range(count)]
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.data, self.at)
            self.at += 8 + length
        return count


def _slim_copy(data: mmap.mmap, header: _Header) -> bytes:
    """The header without long arrays; every tensor keeps its name and shrinks to one number."""
    kept = [span for key, span in header.raw.items() if key not in _VOCABULARY]
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(header.tensors), len(kept))]
    parts += [data[begin:end] for begin, end in kept]
    for name, *_ in header.tensors:
        encoded = name.encode()
        parts.append(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<IQIQ", 1, 1, 0, 0))
    body = b"".join(parts)
    return body + b"\0" * (-len(body) % 32 + 32)
