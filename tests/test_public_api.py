"""The public interface, pinned: a change here is a change for everybody who uses LLMasOS."""

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import llmasos
from llmasos import AsyncLLMasOS, Generation, LLMasOS, UsageError


def test_the_public_names() -> None:
    assert llmasos.__all__ == [
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
    assert all(getattr(llmasos, name) is not None for name in llmasos.__all__)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = llmasos.Nonsense


PROMPT = ["prompt", "model_name"]
SIGNATURES = {
    "generate_text": [
        *PROMPT,
        *("max_length", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
        "return_full_text",
    ],
    "generate": [*PROMPT, "options"],
    "stream_text": [*PROMPT, "options"],
    "generate_batch": ["prompts", "model_name", "options"],
    "chat": ["messages", "model_name", "options"],
    "translate": ["text", "source", "target", "model_name", "options"],
    "answer": ["question", "context", "model_name", "options"],
    "generate_code": ["task", "language", "model_name", "options"],
    "models": [],
    "status": [],
    "close": [],
}


@pytest.mark.parametrize("cls", [LLMasOS, AsyncLLMasOS])
@pytest.mark.parametrize("method", SIGNATURES)
def test_the_arguments_of_both_clients(cls: type, method: str) -> None:
    assert list(inspect.signature(getattr(cls, method)).parameters)[1:] == SIGNATURES[method]


@pytest.mark.parametrize("cls", [LLMasOS, AsyncLLMasOS])
def test_the_defaults_of_generate_text(cls: Any) -> None:
    parameters = inspect.signature(cls.generate_text).parameters.values()
    assert {given.name: given.default for given in parameters if given.default is not given.empty} == {
        "model_name": "smollm2",
        "max_length": None,
        "max_new_tokens": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": None,
        "return_full_text": True,
    }


def test_what_a_generation_says() -> None:
    assert list(inspect.signature(Generation).parameters) == [
        "text",
        "token_ids",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "route",
        "time_to_first_token_s",
        "tokens_per_s",
        "failovers",
        "trace",
    ]


HEAVY = ["torch", "transformers", "hivemind", "aiohttp", "numpy", "uvloop", "rich", "cryptography"]


@pytest.mark.parametrize(
    "statement",
    ["import llmasos", "import llmasos; llmasos.MissingBlocksError", "import llmasos; llmasos.ClientConfig()"],
)
def test_importing_the_package_loads_nothing_heavy(statement: str) -> None:
    script = f"{statement}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("endpoint", ["", [], [""]])
def test_a_client_without_an_endpoint_is_refused(endpoint: str | list[str]) -> None:
    with pytest.raises(UsageError, match="no endpoint") as caught:
        LLMasOS(endpoint=endpoint)
    assert "multiaddr" in caught.value.hint


def test_a_client_is_used_in_a_with_block() -> None:
    client = LLMasOS(endpoint="/ip4/127.0.0.1/tcp/1/p2p/x")
    with pytest.raises(UsageError, match="has not joined"):
        client.models()
    client.close()
    client.close()
    with pytest.raises(UsageError, match="is closed"):
        client.models()


async def test_a_batch_raises_one_error_and_not_a_group() -> None:
    client = AsyncLLMasOS("/ip4/127.0.0.1/tcp/1/p2p/x")
    with pytest.raises(UsageError, match="max_length is 2"):
        await client.generate_batch(["The world is", "Once upon a time"], max_length=2)
    await client.close()
