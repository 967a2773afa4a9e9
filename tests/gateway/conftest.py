"""A gateway over torch peers on the simulated network, spoken to over a real socket on loopback."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from llmasos.blocks.registry import ModelSpec, resolve
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.gateway import Gateway
from llmasos.client.gateway import serve as listen
from llmasos.config import ClientConfig, GatewayConfig
from llmasos.peer.peer import Peer
from tests.checkpoints import make_checkpoint
from tests.swarm.conftest import torch_swarm

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
TINY = "tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 3}
GO_ON = {"model": "tiny", "prompt": "ab", "max_tokens": 9, "seed": 3}
SPANS = ["0:2", "2:5"]


@dataclass
class Stream:
    """What came of a stream of events: the JSON of each, comments, and whether it said that it was done."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    done: bool = False

    def text(self, index: int = 0) -> str:
        """What one choice says."""
        parts = [choice for chunk in self.chunks for choice in chunk.get("choices", []) if choice["index"] == index]
        return "".join(part["delta"].get("content") or "" if "delta" in part else part["text"] for part in parts)


@dataclass
class Served:
    """A running gateway."""

    gateway: Gateway
    client: AsyncLLMasOS
    peers: list[Peer]
    http: TestClient[Any, Any]

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON."""
        answer = await self.http.post(path, json=body, headers=headers)
        return answer.status, await answer.json()

    async def stream(self, path: str, body: dict[str, Any], **headers: str) -> Stream:
        """A streamed answer, read to its end."""
        answer = await self.http.post(path, json={"stream": True, **body}, headers=headers)
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        return read_events(await answer.read())

    async def kv_is_free(self) -> bool:
        """Whether no session holds anything anywhere, once the peers have heard of all that ended."""
        for peer in self.peers:
            await peer.handler.wait_until_idle()
        return all(peer.engine.scheduler.kv_free_tokens == 20_000 for peer in self.peers)


def read_events(raw: bytes) -> Stream:
    """Parse server-sent events, strictly: each is one `data:` line or one comment, and ends with an empty line."""
    stream = Stream()
    assert raw.endswith(b"\n\n")
    for event in raw.decode().removesuffix("\n\n").split("\n\n"):
        assert "\n" not in event
        if event.startswith(": "):
            stream.comments.append(event[2:])
        elif event == "data: [DONE]":
            stream.done = True
        else:
            assert not stream.done
            stream.chunks.append(json.loads(event.removeprefix("data: ")))
    return stream


def error_of(body: dict[str, Any]) -> dict[str, Any]:
    """The error object, whose form never varies."""
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    found: dict[str, Any] = body["error"]
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A random llama with a tokenizer of bytes: its texts are noise, and hardly ever whole characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / TINY
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: index for index, letter in enumerate(alphabet, start=3)}
    make_checkpoint(folder, "llama", vocab_size=len(vocabulary), max_position_embeddings=256)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return resolve(str(folder))


@asynccontextmanager
async def serve(
    spec: ModelSpec,
    spans: Sequence[str] = SPANS,
    source: str | None = None,
    client_config: ClientConfig | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Peers, a client and a gateway."""
    config = GatewayConfig(models=(source,) if source else (), **settings)
    async with torch_swarm(spec, spans, name=source, config=client_config) as (client, peers):
        gateway = Gateway(client, config, client_config or ClientConfig())
        server = TestServer(gateway.app(), handler_cancellation=True)
        async with TestClient(server) as http:
            yield Served(gateway, client, peers, http)


@pytest.fixture
async def tiny_gateway(tiny: ModelSpec) -> AsyncIterator[Served]:
    """The tiny model, served."""
    async with serve(tiny, source=folder_of(tiny)) as served:
        yield served


@pytest.fixture
async def listening(tiny: ModelSpec, tiny_gateway: Served) -> AsyncIterator[str]:
    """The address of a gateway as `llmasos gateway` starts it."""
    config = GatewayConfig(port=0, models=(folder_of(tiny),))
    runner = await listen(tiny_gateway.client, config, ClientConfig())
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


def folder_of(spec: ModelSpec) -> str:
    """Where a directory checkpoint lies."""
    return str(spec.source.path)
