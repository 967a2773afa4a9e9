"""A model class with its list of decoder layers cut: only some run, fed from outside and read from outside.

The class computes masks, rotary embeddings and whatever else its layers are given by itself, for the full length of
the list, and then calls the layers one after another. `Chain` takes the place of that list. Before the first layer
in use it lets everything pass; there it puts in the hidden states that came from elsewhere, whatever the class has
computed before; behind the last layer in use it takes the output and ends the forward pass, whatever would follow.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmasos.span import Span


class Finished(Exception):
    """Carries the wanted hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Passing(torch.Tensor):
    """Hidden states behind a layer that did not run. Classes whose layers return tuples take element 0 of it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self


class Link:
    """One place in the chain. Everything but the call is answered by the layer that belongs there."""

    def __init__(self, chain: "Chain", index: int, layer: nn.Module, loaded: bool) -> None:
        self._chain = chain
        self._index = index
        self._layer = layer
        self._loaded = loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chain = self._chain
        if chain.capture_first:
            raise Finished(args[0] if args else kwargs["hidden_states"])
        assert chain.hidden is not None, "nothing was put into the chain"
        if chain.use is None:  # no layer runs: the given hidden states come out of the last one
            return chain.hidden.as_subclass(Passing)
        if self._index < chain.use.start:
            return (args[0] if args else kwargs["hidden_states"]).as_subclass(Passing)
        assert self._loaded, f"block {self._index} is not loaded"
        if self._index == chain.use.start:
            args, kwargs = _with_hidden(chain.hidden, args, kwargs)
        out = self._layer(*args, **kwargs)
        if self._index == chain.use.end - 1:
            raise Finished(out if isinstance(out, torch.Tensor) else out[0])
        return out


def _with_hidden(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


class Chain(nn.ModuleList):
    """Stands in for a list of decoder layers of which only those of `loaded` have weights."""

    def __init__(self, layers: nn.ModuleList, loaded: Span | None) -> None:
        super().__init__()
        kept = range(0) if loaded is None else loaded.blocks()
        for index in kept:
            self.add_module(str(index), layers[index])
        self.links = [Link(self, index, layer, index in kept) for index, layer in enumerate(layers)]
        self.hidden: torch.Tensor | None = None
        self.use: Span | None = None
        self.capture_first = False

    def feed(self, hidden: torch.Tensor | None, use: Span | None) -> None:
        """What the next forward pass takes in, and through which layers it goes."""
        self.hidden = hidden
        self.use = use

    def __len__(self) -> int:
        return len(self.links)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.links)

    def __getitem__(self, index: Any) -> Any:
        return self.links[index]


class Silence(nn.Module):
    """Stands in for embeddings whose weights are not here: adds nothing, in any shape."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


class Echo(nn.Module):
    """Stands in for norms and projections whose weights are not here: returns what it is given."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


def mute(owner: nn.Module, chain: Chain) -> None:
    """Replace the children of `owner` that need weights, other than the chain, by stand-ins."""
    for name, child in list(owner.named_children()):
        if child is chain or not any(True for _ in child.parameters()):
            continue
        is_embedding = isinstance(child, nn.Embedding) or "Embedding" in type(child).__name__
        setattr(owner, name, Silence() if is_embedding else Echo())
