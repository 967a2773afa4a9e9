"""The three kinds of places that a model comes from, behind one shape: config, tokenizer, weights, digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, TokenizersBackend

from llmasos.blocks import anatomy
from llmasos.blocks.checkpoint import Checkpoint, SafetensorsFiles, canonical, digest
from llmasos.blocks.gguf_file import GgufFile
from llmasos.blocks.hub import HubCheckpoint, HubFiles, weight_map
from llmasos.blocks.quiet import quiet
from llmasos.errors import CheckpointError, UnsupportedModelError

_NEEDED = ("hidden_size", "num_hidden_layers")


class Source(Protocol):
    """Where one model lies."""

    def config(self) -> PretrainedConfig: ...

    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as the checkpoint says; may be empty."""

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def checkpoint(self) -> Checkpoint: ...

    def digest(self) -> str: ...


class DirectorySource:
    """A directory with config.json and safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self) -> PretrainedConfig:
        return config_of(read_json(self.path / "config.json"), str(self.path / "config.json"))

    def eos_token_ids(self) -> tuple[int, ...]:
        return _eos([self.path / "generation_config.json", self.path / "config.json"])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _tokenizer(self.path, str(self.path))

    def checkpoint(self) -> SafetensorsFiles:
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.exists():
            shards = weight_map(index)
            files = sorted(self.path / name for name in set(shards.values()))
            for file in files:
                if not file.exists():
                    raise CheckpointError(
                        f"{file} is missing, which {index.name} names", hint="download or copy the directory again"
                    )
            found = SafetensorsFiles(files)
            for name, shard in shards.items():
                if name not in found.stored:
                    raise CheckpointError(f"tensor {name} is not in {self.path / shard}, where {index.name} says it is")
            return found
        if single.exists():
            return SafetensorsFiles([single])
        pickled = sorted(file.name for file in [*self.path.glob("*.bin"), *self.path.glob("*.pt*")])
        if pickled:
            raise CheckpointError(
                f"{self.path} has its weights pickled ({', '.join(pickled[:3])}), which is not read here: loading a "
                "pickle runs the code in it",
                hint="where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)",
            )
        raise CheckpointError(f"{self.path} has no model.safetensors", hint="is the download complete?")

    def digest(self) -> str:
        return digest(read_json(self.path / "config.json"), self.checkpoint().stored)


class GgufSource:
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)

    def config(self) -> PretrainedConfig:
        return config_of(self.file.config_dict(), str(self.file.path))

    def eos_token_ids(self) -> tuple[int, ...]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return tuple(dict.fromkeys(int(self.file.metadata[key]) for key in keys if key in self.file.metadata))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        path = self.file.path
        try:
            with quiet():
                return cast(
                    PreTrainedTokenizerBase, TokenizersBackend.from_pretrained(str(path.parent), gguf_file=path.name)
                )
        except Exception as error:  # the tokenizers library raises plain ones
            raise CheckpointError(f"{path} holds no tokenizer that transformers reads: {error}") from error

    def checkpoint(self) -> GgufFile:
        return self.file

    def digest(self) -> str:
        return digest({"header": self.file.header_digest}, self.file.stored)


class HubSource:
    """A repository on the Hugging Face hub, at the revision that its main branch has when it is first asked."""

    def __init__(self, repository: str) -> None:
        self.files = HubFiles(repository)

    def config(self) -> PretrainedConfig:
        return config_of(read_json(self.files.config_path), self.files.repository)

    def eos_token_ids(self) -> tuple[int, ...]:
        generation = self.files.get("generation_config.json")
        return _eos([path for path in (generation, self.files.config_path) if path is not None])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            self.files.get(name)
        for name in ("tokenizer.model", "vocab.json", "merges.txt"):
            if not (self.files.config_path.parent / "tokenizer.json").exists():
                self.files.get(name)
        return _tokenizer(self.files.config_path.parent, self.files.repository)

    def checkpoint(self) -> HubCheckpoint:
        return HubCheckpoint(self.files)

    def digest(self) -> str:
        state = hashlib.sha256(self.files.revision.encode())
        state.update(canonical(read_json(self.files.config_path)))
        return state.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not hold an object")
    return found


def config_of(found: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The transformers config for what a file says. Raises CheckpointError or UnsupportedModelError."""
    family = found.get("model_type")
    if not isinstance(family, str):
        raise CheckpointError(f"{where} does not say which model_type it is for")
    if "auto_map" in found and family not in _known_families():
        raise UnsupportedModelError(
            f"{family} models bring their own code, which is not run here",
            hint="families that transformers knows itself are served",
        )
    if family not in _known_families():
        raise UnsupportedModelError(f"transformers knows no family {family!r} (named in {where})")
    try:
        with quiet():
            config = AutoConfig.for_model(**found)
    except (*anatomy.MISFITS, StrictDataclassError) as error:
        raise CheckpointError(f"{where} is not a config of a {family} model: {error}") from error
    if anatomy.text_config(config) is config and not getattr(config, "is_encoder_decoder", False):
        _require_fields(config, found, where)
    return cast(PretrainedConfig, config)


def _require_fields(config: PretrainedConfig, found: Mapping[str, Any], where: str) -> None:
    """A missing size would silently become that of the family's first model."""
    aliases = getattr(type(config), "attribute_map", {})
    for name in _NEEDED:
        if name not in found and aliases.get(name) not in found:
            raise CheckpointError(f"{where} does not say {aliases.get(name, name)}")


def _known_families() -> Mapping[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return cast(Mapping[str, Any], CONFIG_MAPPING_NAMES)


def _eos(files: list[Path]) -> tuple[int, ...]:
    """Of the first file that says something."""
    for file in files:
        stated = read_json(file).get("eos_token_id") if file.exists() else None
        if stated is not None:
            return tuple(int(token) for token in (stated if isinstance(stated, list) else [stated]))
    return ()


def _tokenizer(path: Path, where: str) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain ones
        raise CheckpointError(
            f"{where} holds no tokenizer that transformers reads: {error}", hint="add the model's tokenizer.json"
        ) from error
    return cast(PreTrainedTokenizerBase, found)
