"""The parts of hivemind 1.1.12 that we use, imported lean, with the repairs that a swarm of strangers needs.

`import hivemind` runs a package __init__ that pulls in torch, scipy and the training code: four seconds and 250 MB.
Here the package is registered without running it, and the two helpers that want torch are replaced by empty
stand-ins, which nothing on our path calls: 0.2 s, no torch. Torch may be imported before or after. Whoever needs the
rest of hivemind must import it in another process.

Repairs, each of a fault that one bad node could use against all (docs: HIVEMIND notes in docs/log.md):
- a rejected older store no longer shortens the life of the newer value (`TimedStorage.store`);
- one invalid entry no longer spoils the whole dictionary of an honest replica;
- a node id is the hash of the peer id, so nobody can take another's place in a routing table;
- keys per node and entries per key are bounded, so that a reply stays under the 4 MiB that a unary call can carry.
"""

import importlib
import importlib.util
import logging
import sys
import types
from functools import lru_cache
from typing import Any

MAX_ENTRIES = 1_500
"""Live records under one topic. 1,500 of MAX_RECORD_BYTES and their envelopes stay below the 4 MiB of one reply."""
MAX_KEYS = 10_000
"""Topics that one node stores for others; beyond it those that expire first go first."""


def _register_bare(name: str) -> None:
    """Make `import name.x` work without running the __init__ of `name`."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"{name} is not installed")
    sys.modules[name] = importlib.util.module_from_spec(spec)


def _register_stand_in(name: str, attribute: str) -> None:
    module = types.ModuleType(name, "Stands in for a module that needs torch; see llmasos.p2p_hivemind.")
    setattr(module, attribute, type(attribute, (), {}))
    sys.modules[name] = module


def _import_lean() -> None:
    if "hivemind" in sys.modules:
        return  # somebody has paid for all of it already
    _register_bare("hivemind")
    _register_stand_in("hivemind.utils.mpfuture", "MPFuture")
    _register_stand_in("hivemind.utils.tensor_descr", "TensorDescriptor")
    _register_bare("hivemind.dht")


_import_lean()

import hivemind.dht.node as _node  # noqa: E402
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.protocol import DHTProtocol  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue  # noqa: E402
from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.proto import p2pd_pb2  # noqa: E402
from hivemind.utils.logging import use_hivemind_log_handler  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from hivemind.utils.timed_storage import TimedStorage, get_dht_time  # noqa: E402

__all__ = [
    "DHTID",
    "P2P",
    "DHTNode",
    "DHTRecord",
    "Multiaddr",
    "PeerID",
    "RecordValidatorBase",
    "get_dht_time",
    "node_id_of",
    "p2pd_path",
    "p2pd_pb2",
]

use_hivemind_log_handler("nowhere")  # its records go through our handlers, like everybody's
logging.getLogger("hivemind").setLevel(logging.ERROR)
logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames the level for the whole process


def p2pd_path() -> str:
    """The libp2p daemon that the hivemind wheel ships."""
    [folder] = importlib.import_module("hivemind.hivemind_cli").__path__
    return f"{folder}/p2pd"


@lru_cache(maxsize=4096)
def _node_id_of(peer_id: bytes) -> Any:
    return DHTID.generate(peer_id)


def node_id_of(peer: Any) -> Any:
    """The only node id that we accept from this peer (a hivemind PeerID)."""
    return _node_id_of(peer.to_bytes())


def _store(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
    """Replaces TimedStorage.store, which lets an older value shorten the life of the newer one that it lost against."""
    current = self.data.get(key)
    if current is not None and current.expiration_time >= expiration_time:
        return False
    stored: bool = _original_store(self, key, value, expiration_time)
    return stored


_original_store = TimedStorage.store
TimedStorage.store = _store


class _Storage(DHTLocalStorage):  # type: ignore[misc]
    """What one node keeps for others, bounded."""

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        stored: bool = super().store_subkey(key, subkey, value, expiration_time)
        found = self.data.get(key)
        if found is not None and isinstance(found.value, DictionaryDHTValue):
            found.value.maxsize = MAX_ENTRIES
        return stored


class _Protocol(DHTProtocol):  # type: ignore[misc]
    """hivemind's DHT protocol among peers whose node ids are proven. Its class name is part of the wire protocol."""

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> Any:
        self = await super().create(*args, **kwargs)
        self.storage = _Storage(maxsize=MAX_KEYS)
        return self

    async def update_routing_table(self, node_id: Any, peer_id: Any, responded: bool = True) -> None:
        if node_id is None or node_id == node_id_of(peer_id):
            await super().update_routing_table(node_id, peer_id, responded)

    async def call_find(self, peer: Any, keys: Any) -> Any:
        found = await super().call_find(peer, keys)
        if found is None:
            return None
        return {
            key: (value, {node: near for node, near in nearest.items() if node == node_id_of(near)})
            for key, (value, nearest) in found.items()
        }

    def _validate_dictionary(self, key_bytes: bytes, dictionary: Any) -> bool:
        """Drop what is invalid and keep the rest, where hivemind drops all for one."""
        with dictionary.freeze():
            for subkey, (value, expiration_time) in list(dictionary.items()):
                if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expiration_time):
                    del dictionary[subkey]
        return True


_Protocol.__name__ = "LLMasOSRegistry"  # so that its calls never meet those of other hivemind swarms
_node.DHTProtocol = _Protocol
