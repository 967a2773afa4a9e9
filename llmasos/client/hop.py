"""One hop of a session, as the client sees it: a peer, a stream to it, and how it stands."""

import asyncio
import logging

from llmasos.config import PONG_TIMEOUT_S, PREFIX_PAGE_TOKENS, SEND_TIMEOUT_S, SLOW_LINK_BYTES_PER_S
from llmasos.deadlines import within
from llmasos.errors import (
    ConnectionLostError,
    PeerError,
    PeerFaultError,
    PeerRefusedError,
    PeerTimeoutError,
)
from llmasos.network import Network, Stream
from llmasos.routing.planner import Hop
from llmasos.routing.tickets import Ticket
from llmasos.wire import (
    PROTOCOL,
    AnyMessage,
    Close,
    Contact,
    Failed,
    FrameError,
    NextHop,
    Open,
    Opened,
    Ping,
    Pong,
    Reroute,
    decode,
    encode,
)

log = logging.getLogger(__name__)


class HopLink:
    """A hop. Every way in which its peer can let us down becomes a PeerError, raised by whatever was tried."""

    def __init__(self, plan: Hop, session: str) -> None:
        self.plan = plan
        self.session = session  # its name on that peer
        self.lagging = True  # its kv cache may lack positions that have been answered
        self.relay = False  # it cannot reach the next hop: its rows come to us, and we send them on
        self.cut_off = False  # it said so, and we have not looked into it yet
        self.lost: PeerError | None = None
        self.told: Reroute | None = None  # what it knows of its neighbours
        self.draining = False  # it said that it is about to go
        self.stays_until = 0.0  # when to look again for somebody who takes over from it (loop time)
        self.codecs: tuple[str, ...] = ()  # how it can pack rows
        self.prefix_tokens = 0  # positions that it held when the session was opened on it
        self.ticket: Ticket | None = None  # tells the router that we are there
        self.progress = Pong()  # how far its steps had come when it last said so
        self._pings: dict[int, tuple[float, asyncio.Future[None]]] = {}  # unanswered: number -> sent at, pong
        self._pinged = 0
        self._stream: Stream | None = None

    @property
    def as_next(self) -> NextHop:
        """What the hop before is told of this one."""
        return NextHop(Contact(self.plan.peer, self.plan.addresses), self.session)

    async def open(self, network: Network, request: Open, timeout_s: float) -> None:
        """Connect and be admitted."""
        try:
            async with asyncio.timeout(timeout_s):
                self._stream = await network.connect(self.as_next.contact, PROTOCOL)
                await self._stream.send(encode(request))
                answer = await self.receive()
        except TimeoutError:
            raise PeerTimeoutError(self.plan.peer, "did not open a session in time") from None
        if not isinstance(answer, Opened):
            raise as_peer_error(self.plan.peer, answer)
        self.codecs = answer.codecs
        # Whole pages of those that were named: a peer that claims more could make us leave out rows.
        self.prefix_tokens = min(answer.prefix_tokens // PREFIX_PAGE_TOKENS, len(request.prefix)) * PREFIX_PAGE_TOKENS
        self.told = Reroute(upstream=request.upstream, downstream=request.downstream, relay=request.relay)

    async def send(self, message: AnyMessage) -> None:
        """Send a frame. Raises PeerTimeoutError when the peer takes in nothing."""
        if self.lost is not None:
            raise self.lost
        assert self._stream is not None, "only hops that were opened are sent to"
        frame = encode(message)
        try:
            await within(SEND_TIMEOUT_S + len(frame) / SLOW_LINK_BYTES_PER_S, self._stream.send(frame))
        except TimeoutError:
            raise PeerTimeoutError(self.plan.peer, "takes nothing in") from None

    async def receive(self) -> AnyMessage:
        """The next message of the peer."""
        assert self._stream is not None, "only hops that were opened are listened to"
        try:
            return decode(await self._stream.receive())
        except FrameError as error:
            raise PeerFaultError(self.plan.peer, f"sent a bad frame: {error}") from error

    async def send_ping(self) -> asyncio.Future[None]:
        """Renew the lease, and measure the way there and back. What is returned is done when the pong is here."""
        loop = asyncio.get_running_loop()
        self._pinged += 1
        pong: asyncio.Future[None] = loop.create_future()
        self._pings[self._pinged] = loop.time(), pong
        await self.send(Ping(nonce=self._pinged))
        return pong

    def hear_pong(self, pong: Pong) -> float | None:
        """Take a pong in, as whoever listens to the hop; the round trip in seconds, if it answers a ping of ours."""
        asked = self._pings.get(pong.nonce)
        if asked is None:
            return None
        self.progress = pong
        for number in [number for number in self._pings if number <= pong.nonce]:
            _wake(self._pings.pop(number)[1])
        return asyncio.get_running_loop().time() - asked[0]

    async def ping(self) -> None:
        """Wait for a sign of life; whatever was sent before has been heard by then."""
        try:
            async with asyncio.timeout(PONG_TIMEOUT_S):
                await (await self.send_ping())
        except TimeoutError:
            raise PeerTimeoutError(self.plan.peer, "is silent") from None
        if self.lost is not None:
            raise self.lost

    def lose(self, error: PeerError) -> None:
        """It can no longer be used; whoever waits for a pong need not."""
        self.lost = error
        while self._pings:
            _wake(self._pings.popitem()[1][1])

    async def hang_up(self) -> None:
        """Say goodbye and close the stream; a peer that is lost or does not listen is not waited for."""
        if self._stream is None:
            return
        try:
            async with asyncio.timeout(PONG_TIMEOUT_S):
                if self.lost is None:
                    await self._stream.send(encode(Close()))
                await self._stream.close()
        except (ConnectionLostError, TimeoutError) as error:
            log.debug("leaving %s: %s", self.plan.peer, error)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def as_peer_error(peer: str, message: AnyMessage) -> PeerError:
    """The error that a peer's answer amounts to, whatever it says of us."""
    if not isinstance(message, Failed):
        return PeerFaultError(peer, f"answered with {type(message).__name__}")
    match message.code:
        case "refused":
            return PeerRefusedError(peer, message.message, retry_after_s=message.retry_after_s)
        case "next_hop_lost" | "unknown_session":
            return ConnectionLostError(peer, message.message)
        case _:
            return PeerFaultError(peer, message.message)
