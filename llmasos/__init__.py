"""LLMasOS: an operating system for large language models over a swarm of peers.

from llmasos import LLMasOS

with LLMasOS(endpoint="/ip4/…/p2p/12D3Koo…") as client:
    print(client.generate_text(prompt="The world is", max_length=100))

What is listed in `__all__` is the public interface. The client is imported when it is first used, so that
`import llmasos` costs milliseconds and a process pays for torch only if it computes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llmasos.errors import (
    CheckpointError,
    ConnectionLostError,
    LLMasOSError,
    MissingBlocksError,
    ModelError,
    PeerError,
    PeerFaultError,
    PeerRefusedError,
    PeerTimeoutError,
    SwarmError,
    SwarmUnreachableError,
    UnknownModelError,
    UnsupportedModelError,
    UsageError,
)

if TYPE_CHECKING:
    from llmasos.client.async_client import AsyncLLMasOS
    from llmasos.client.client import LLMasOS
    from llmasos.client.generation import Generation
    from llmasos.client.transformers_model import SwarmModelForCausalLM
    from llmasos.config import ClientConfig

__version__ = "0.1.0"

__all__ = [
    "AsyncLLMasOS",
    "CheckpointError",
    "ClientConfig",
    "ConnectionLostError",
    "Generation",
    "LLMasOS",
    "LLMasOSError",
    "MissingBlocksError",
    "ModelError",
    "PeerError",
    "PeerFaultError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "SwarmError",
    "SwarmModelForCausalLM",
    "SwarmUnreachableError",
    "UnknownModelError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
]

_LAZY = {
    "AsyncLLMasOS": "llmasos.client.async_client",
    "ClientConfig": "llmasos.config",
    "Generation": "llmasos.client.generation",
    "LLMasOS": "llmasos.client.client",
    "SwarmModelForCausalLM": "llmasos.client.transformers_model",
}


def __getattr__(name: str) -> object:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module 'llmasos' has no attribute {name!r}")
    return getattr(import_module(home), name)
