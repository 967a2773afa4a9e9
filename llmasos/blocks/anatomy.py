"""Where a model class keeps its decoder layers, and whether they can run on different machines.

No family has a class of its own here. A model is built from its config without memory for its weights (on torch's
meta device), its list of decoder layers is found, and what could make a block depend on more than the hidden states
that enter it and its own kv is looked for and refused by name. What cannot be seen from here is tried out on the
loaded blocks (`llmasos.blocks.trial`).
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmasos.blocks.attention import NAME as PACKED
from llmasos.blocks.devices import DTYPES
from llmasos.blocks.quiet import quiet
from llmasos.errors import CheckpointError, UnsupportedModelError

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_UNSTEADY_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change with the length of the sequence; steady up to the original length."""


@dataclass(slots=True)
class Anatomy:
    """A model without weights, and where its parts are."""

    model: Any  # the causal language model, on the meta device
    owner_name: str  # dotted name of the module that runs the layers
    list_name: str  # attribute of that module that is the list of layers
    blocks: int
    packed: bool  # whether many sessions can share a forward pass
    attention: str  # what runs the attention otherwise
    takes_positions: bool  # whether the owner is told the positions of its rows

    @property
    def owner(self) -> Any:
        """The module whose forward runs the layers."""
        return self.model.get_submodule(self.owner_name)

    @property
    def layers(self) -> nn.ModuleList:
        return self.owner.get_submodule(self.list_name)  # type: ignore[no-any-return]

    @property
    def prefix(self) -> str:
        """What the names of all tensors of layers begin with, as in `model.layers.`."""
        return ".".join(part for part in (self.owner_name, self.list_name) if part) + "."


MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model class raises when a config makes no sense to it, or it is run in a way that it was not made for."""


def dissect(config: PretrainedConfig, dtype: str) -> Anatomy:
    """Build the model of `config` without memory and find its layers. Raises UnsupportedModelError."""
    refuse_by_config(config)
    model = _on_meta(config, dtype, None)
    refuse_by_class(model)
    owner_name, list_name, blocks = _find_layers(model)
    takes_positions = "position_ids" in _parameters(model.get_submodule(owner_name))
    packed = takes_positions and _has_attention_seam(model)
    fallback = "sdpa" if model._supports_sdpa else "eager"
    if packed:
        model = _on_meta(config, dtype, PACKED)
    elif model.config._attn_implementation != fallback:
        model = _on_meta(config, dtype, fallback)
    return Anatomy(model.eval(), owner_name, list_name, blocks, packed, fallback, takes_positions)


def _on_meta(config: PretrainedConfig, dtype: str, attention: str | None) -> Any:
    try:
        return _build(config, dtype, attention, _NumbersOnCPU())
    except MISFITS:  # it computes with numbers and with parameters at once: slower, but all of it without memory then
        try:
            return _build(config, dtype, attention, nullcontext())
        except MISFITS as error:
            raise CheckpointError(
                f"the config of this {config.model_type} model does not describe a model: {error}",
                hint="look into its config.json",
            ) from error


def _build(config: PretrainedConfig, dtype: str, attention: str | None, mode: AbstractContextManager[Any]) -> Any:
    chosen = {} if attention is None else {"attn_implementation": attention}
    with quiet(), torch.device("meta"), mode, no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPES[dtype], **chosen)
        model.tie_weights()
    return model


class _NumbersOnCPU(TorchFunctionMode):
    """Positions, constants, and what is computed from them alone, are real numbers: without memory, torch does its
    sums in Python that imports sympy, half a second and 45 MB. `Loader.settle` computes them again where they belong.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in (torch.arange, torch.linspace, torch.tensor) and given.get("device") is None:
            given = {**given, "device": "cpu"}
        return func(*args, **given)


def refuse_by_config(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError for what the config says and block-by-block serving does not do."""
    family = config.model_type
    reason = _unfit_config(config, text_config(config))
    if reason:
        raise UnsupportedModelError(
            f"{family} models cannot be served block by block: {reason}",
            hint="decoder-only models with softmax attention can, as llama, qwen3, gemma2, phi3 or gpt2",
        )


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the language model; the config itself where that is all it describes."""
    try:
        return config.get_text_config()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{config.model_type} models cannot be served block by block: they hold several text models"
        ) from error


def _unfit_config(config: PretrainedConfig, text: PretrainedConfig) -> str:
    """The reason, or an empty string."""
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if text is not config:
        return "it is multimodal, and only checkpoints of the text part alone are served"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model class for it"
    kinds = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"it has {', '.join(sorted(map(str, kinds)))} layers, which carry a state that is not a kv cache"
    if getattr(text, "num_kv_shared_layers", 0):
        return "some of its layers use the kv of other layers"
    if getattr(text, "hidden_size_per_layer_input", 0):
        return "its layers take inputs of their own beside the hidden states"
    if getattr(text, "add_cross_attention", False):
        return "it has cross-attention"
    if getattr(text, "use_bidirectional_attention", False) or getattr(text, "is_causal", True) is False:
        return "its attention is not causal"
    if getattr(config, "quantization_config", None) is not None:
        return "its checkpoint is quantised, and only GGUF quantisation is read"
    return ""


def refuse_by_class(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for what the model class says of itself."""
    family = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{family} models cannot be served block by block: they carry a recurrent state that cannot be cut back",
            hint="decoder-only models with softmax attention can, as llama, qwen3, gemma2, phi3 or gpt2",
        )


def _find_layers(model: Any) -> tuple[str, str, int]:
    """Name of the owner, name of the list in it, and its length."""
    family = model.config.model_type
    blocks = int(getattr(text_config(model.config), "num_hidden_layers", 0) or 0)
    found = [name for name, module in _outer_lists(model, "") if len(module) == blocks]
    if blocks < 1 or len(found) != 1:
        raise UnsupportedModelError(
            f"{family} models cannot be served block by block: their class has {len(found)} lists of "
            f"{blocks} decoder layers, not one"
        )
    owner_name, _, list_name = found[0].rpartition(".")
    owner = model.get_submodule(owner_name)
    lacking = sorted({"inputs_embeds", "past_key_values"} - _parameters(owner))
    if lacking or not isinstance(owner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{family} models cannot be served block by block: {type(owner).__name__}, which runs their layers, takes "
            f"no {' and no '.join(lacking) or 'part in the usual interface'}"
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=True)]
    if len(names) != len(list(model.named_parameters(remove_duplicate=False))) and _layers_share(owner, list_name):
        raise UnsupportedModelError(f"{family} models cannot be served block by block: their layers share weights")
    return owner_name, list_name, blocks


def _outer_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """All lists of modules that do not lie inside another one."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outer_lists(child, f"{prefix}{name}.")


def _layers_share(owner: nn.Module, list_name: str) -> bool:
    layers = owner.get_submodule(list_name)
    seen: set[int] = set()
    for layer in layers.children():
        own = {id(parameter) for parameter in layer.parameters()}
        if own & seen:
            return True
        seen |= own
    return False


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _has_attention_seam(model: PreTrainedModel) -> bool:
    """Whether the family's code looks its attention function up, so that ours can be put there."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def context_tokens(config: PretrainedConfig) -> tuple[int, bool]:
    """Positions that a model serves, and whether one more would change the earlier ones.

    Rotary embeddings of the kinds `dynamic` and `longrope` are recomputed for all positions when a sequence outgrows
    the original length. Keys that are cached already would stay as they were, so these models end there.
    """
    text = text_config(config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    stated = next((value for name in names if (value := getattr(text, name, None))), 2048)
    unsteady = [rope for rope in _ropes(text) if rope.get("rope_type") in _UNSTEADY_ROPE]
    if not unsteady:
        return int(stated), False
    original = [rope.get("original_max_position_embeddings") for rope in unsteady]
    original.append(getattr(text, "original_max_position_embeddings", None))
    return min(int(value) for value in [stated, *original] if value), True


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of its rotary embeddings: one set, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, dict)]
