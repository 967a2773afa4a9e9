"""What strangers announce under the name of a model that a gateway serves: nobody owns a name."""

from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from llmasos.blocks.registry import ModelSpec
from llmasos.client.gateway import Gateway
from llmasos.config import LEASE_S, ClientConfig, GatewayConfig
from llmasos.routing.directory import model_topic
from llmasos.routing.records import PeerRecord
from llmasos.routing.view import SwarmView
from llmasos.routing.view import status as describe
from sim.network import SimNetwork
from tests.gateway.conftest import COMPLETIONS, GO_ON, Served, error_of, folder_of, serve
from tests.routing.builders import NOW, a_record, a_view


async def announce(served: Served, blocks: str, **claims: Any) -> None:
    """Three strangers say that they serve these blocks of the tiny model."""
    peer: Any = served.peers[0]
    for number in range(3):
        stranger: SimNetwork = peer.network.swarm.network(f"stranger{number}")
        record = a_record(stranger.peer_id, blocks, model="tiny", announced_at=stranger.now(), **claims)
        assert await stranger.publish(model_topic("tiny"), record.to_bytes(), LEASE_S)


async def test_a_model_of_many_blocks_that_most_announce_does_not_hide_ours(tiny: ModelSpec) -> None:
    """Under another digest or under ours, which is no secret."""
    for digest in ("sha256:bad", tiny.digest):
        async with serve(tiny, source=folder_of(tiny)) as served:
            await announce(served, "0:1", digest=digest, model_blocks=1_024)
            status, answer = await served.post(COMPLETIONS, GO_ON)
            assert (status, answer["usage"]["completion_tokens"]) == (200, 9)
            listed = await (await served.http.get("/v1/models")).json()
            assert [model["id"] for model in listed["data"]] == ["tiny"]


async def test_blocks_of_another_checkpoint_fill_no_gap_of_ours(tiny: ModelSpec) -> None:
    async with serve(tiny, ["0:2", "3:5"], source=folder_of(tiny)) as served:
        await announce(served, "0:5", digest="sha256:bad", model_blocks=5)
        assert (await (await served.http.get("/v1/models")).json())["data"] == []
        status, answer = await served.post(COMPLETIONS, GO_ON)
        assert (status, error_of(answer)["code"]) == (503, "missing_blocks")
        assert "--blocks 2:3" in error_of(answer)["message"]
        assert "others have, but of another checkpoint" in error_of(answer)["message"]


class Onlooker:
    """A client that sees these records, and has loaded nothing."""

    endpoints = ("somewhere",)

    def __init__(self, *records: PeerRecord) -> None:
        self.view: SwarmView = a_view(*records)

    async def status(self) -> dict[str, Any]:
        return describe(self.view, NOW)


async def test_a_model_that_was_not_loaded_yet_is_offered_if_one_checkpoint_of_it_is_whole() -> None:
    """Which of them is ours is known once it is loaded."""
    strangers = [a_record(f"stranger{number}", "0:1", digest="sha256:bad", model_blocks=1_024) for number in range(3)]
    for last, offered in (("12:30", ["smollm2"]), ("12:29", [])):
        client: Any = Onlooker(a_record("alice", "0:12"), a_record("bob", last), *strangers)
        gateway = Gateway(client, GatewayConfig(), ClientConfig())
        async with TestClient(TestServer(gateway.app())) as http:
            listed = await (await http.get("/v1/models")).json()
            assert [model["id"] for model in listed["data"]] == offered
