"""Where peers are, and how far that is.

Round trips between data centres of public clouds, in ms, rounded to 5: what their own latency pages and independent
ping tables show within about 10 %. Home connections add their own on top.
"""

from dataclasses import dataclass

from llmasos.network import PeerId
from sim.network import Link, peer_of

REGIONS = ("us-east", "us-west", "eu-west", "eu-central", "sa-east", "ap-northeast", "ap-southeast", "ap-south")
RTT_MS = (
    (2, 65, 70, 90, 115, 150, 215, 190),
    (65, 2, 130, 145, 175, 105, 170, 220),
    (70, 130, 2, 25, 180, 205, 175, 125),
    (90, 145, 25, 2, 200, 225, 160, 115),
    (115, 175, 180, 200, 2, 260, 325, 305),
    (150, 105, 205, 225, 260, 2, 70, 125),
    (215, 170, 175, 160, 325, 70, 2, 60),
    (190, 220, 125, 115, 305, 125, 60, 2),
)
LOCAL_RTT_S = 0.001
"""Between machines of one local network, when a scenario names no regions."""
RELAY_RTT_S = 0.06
"""What a detour through a relay of another operator adds: about once across a continent."""
RELAY_SHARE = 0.1
"""Of a link's bandwidth is what a shared relay leaves."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member of the swarm is."""

    region: str = ""
    relayed: bool = False


LOCAL = Place()


def rtt_s(a: Place, b: Place) -> float:
    """The round trip between two places, without jitter."""
    base_s = LOCAL_RTT_S
    if a.region and b.region:
        base_s = RTT_MS[REGIONS.index(a.region)][REGIONS.index(b.region)] / 1000
    return base_s + RELAY_RTT_S * (a.relayed or b.relayed)


class Map:
    """Who is where, and what every link between them is like. Who is not on it is on the local network."""

    def __init__(self, *, bytes_per_s: float, jitter: float, loss: float) -> None:
        self._places: dict[str, Place] = {}
        self._bytes_per_s = bytes_per_s
        self._jitter = jitter
        self._loss = loss

    def put(self, name: str, place: Place) -> None:
        """Enter the member of that name."""
        self._places[peer_of(name)] = place

    def place_of(self, peer: str) -> Place:
        """Where a member is."""
        return self._places.get(peer, LOCAL)

    def rtt_s(self, a: str, b: str) -> float:
        """The round trip between two members."""
        return rtt_s(self._places.get(a, LOCAL), self._places.get(b, LOCAL))

    def link(self, a: PeerId, b: PeerId) -> Link:
        """One direction between two members."""
        relayed = any(self._places.get(peer, LOCAL).relayed for peer in (a, b))
        return Link(
            latency_s=self.rtt_s(a, b) / 2,
            bytes_per_s=self._bytes_per_s * (RELAY_SHARE if relayed else 1.0),
            jitter=self._jitter,
            loss=self._loss,
        )
