"""What a peer tells the swarm about itself, and when."""

import asyncio
import json
import logging
from collections.abc import Callable

from llmasos.config import ANNOUNCE_EVERY_S, INDEX_LEASE_S, LEASE_S
from llmasos.errors import ConnectionLostError
from llmasos.network import Network
from llmasos.routing.directory import MODELS_TOPIC, model_topic
from llmasos.routing.records import PeerRecord, PeerState

log = logging.getLogger(__name__)


class Announcer:
    """Publishes the record that `describe(state)` gives: at once when the state changes, and well within its lease; and
    lists the model, so that strangers find it.
    """

    def __init__(self, network: Network, describe: Callable[[PeerState], PeerRecord]) -> None:
        self._network = network
        self._describe = describe
        self._state = PeerState.JOINING
        self._listed_at = float("-inf")  # when the list of models was last told of ours (network time)
        self._lock = asyncio.Lock()

    @property
    def state(self) -> PeerState:
        """The state that was last announced, or is being announced."""
        return self._state

    async def announce(self, state: PeerState) -> None:
        """Tell the swarm of a new state. A registry that is out of reach is no failure: the next round tells it."""
        self._state = state
        await self._publish()

    async def serve(self) -> None:
        """Repeat the announcement until cancelled."""
        while True:
            await asyncio.sleep(ANNOUNCE_EVERY_S)
            await self._publish()

    async def _publish(self) -> None:
        async with self._lock:  # a round and a change of state must not overtake each other
            record = self._describe(self._state)
            try:
                stored = await self._network.publish(model_topic(record.model), record.to_bytes(), LEASE_S)
                if not 0 <= record.announced_at - self._listed_at < INDEX_LEASE_S / 3:  # below: our clock was set back
                    entry = json.dumps({"model": record.model}).encode()
                    listed = await self._network.publish(MODELS_TOPIC, entry, INDEX_LEASE_S)
                    if listed:
                        self._listed_at = record.announced_at
                    stored &= listed
            except ConnectionLostError as error:  # our own daemon is gone; who runs the peer watches for that
                log.debug("not announced: %s", error.message)
                return
        if not stored:
            log.warning(
                "nobody stored the announcement: no other peer is in reach, or this machine's clock is minutes slow; "
                "trying again in %.0f s",
                ANNOUNCE_EVERY_S,
            )
