"""Fills the loaded part of a model with its weights, one block at a time.

The renaming and merging of checkpoint tensors, the numeric type of each, and the buffers that are computed rather
than stored are left to transformers, so that every family loads as `from_pretrained` would load it. Here it is only
decided which tensors are read, and checked that none is missing, left over or of the wrong shape.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from llmasos.blocks.checkpoint import Checkpoint
from llmasos.blocks.quiet import quiet
from llmasos.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes to read in all."""

_OUTDATED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")
"""Ends of names of buffers that older releases stored and newer ones compute."""


class Loader:
    """Reads tensors of one checkpoint into one model."""

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self._settings = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), device_map={"": torch.device(device)}
        )
        self._targets: Mapping[str, str] = checkpoint.names(model)
        """By tensor name: the parameter it goes into. Made before the model is cut."""
        self._mapping = get_model_conversion_mapping(model)
        self._device = device

    def tensors(self, prefix: str) -> list[str]:
        """The tensors that go into parameters whose names begin so."""
        return [name for name, target in self._targets.items() if target.startswith(prefix)]

    def others(self, prefix: str) -> list[str]:
        """The tensors that go elsewhere."""
        return [name for name, target in self._targets.items() if not target.startswith(prefix)]

    def nbytes(self, names: Iterable[str]) -> int:
        """How much there is to read."""
        return self.checkpoint.nbytes(names)

    def load(self, names: list[str], what: str) -> set[str]:
        """Read these tensors. Returns the parameters of the model that are still without weights."""
        settings = replace(self._settings, weight_mapping=copy.deepcopy(self._mapping))
        with quiet():
            state = self.checkpoint.state(self.model, names)
            info, _ = convert_and_load_state_dict_in_model(self.model, state, settings, None)
        for name, given, expected in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"tensor {name} in {self.checkpoint.where()} has the shape {list(given)}, and the config of the model "
                f"says {list(expected)}"
            )
        for name, reason in info.conversion_errors.items():
            raise CheckpointError(f"tensor {name} in {self.checkpoint.where()} does not fit: {reason.splitlines()[-1]}")
        self.model._adjust_missing_and_unexpected_keys(info)
        extra = sorted(name for name in info.unexpected_keys if not name.endswith(_OUTDATED))
        if extra:
            raise CheckpointError(
                f"{self.checkpoint.where()} holds tensors of {what} that a {self.model.config.model_type} model with "
                f"this config has no place for: {', '.join(extra[:3])}",
                hint="config and weights do not belong together",
            )
        return set(info.missing_keys)

    def refuse_missing(self, missing: Iterable[str]) -> None:
        """Raise CheckpointError if there are any."""
        names = sorted(missing)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"tensor {', '.join(names[:3])}{more} is missing in {self.checkpoint.where()}",
                hint="is the download complete, and the config of the same model?",
            )

    def settle(self, part: nn.Module) -> None:
        """Compute the buffers of `part` that no checkpoint stores, as the family does; the rest is loaded already."""
        for name, buffer in _computed_buffers(part):
            owner = part.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = torch.empty_like(buffer, device=self._device)
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = True  # what is not loaded has no memory to fill with random numbers
        with quiet(), torch.no_grad():
            self.model.initialize_weights()


def _computed_buffers(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, buffer in part.named_buffers():
        owner = part.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[2] in owner._non_persistent_buffers_set:
            found.append((name, buffer))
    return found


def left_on_meta(part: nn.Module) -> list[str]:
    """Names of tensors of `part` that have no memory yet."""
    return [name for name, tensor in [*part.named_parameters(), *part.named_buffers()] if tensor.is_meta]
