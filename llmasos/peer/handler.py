"""Wire <-> sessions: what a peer does with an inbound stream.

A stream's first frame says what it is: `Open` begins a session, `Attach` joins the previous hop of one to it, `Ping`
asks how far away we are. Whatever else arrives - garbage included - is answered with a typed refusal, and only that
stream ends: no other session notices.
"""

import asyncio
import itertools
import logging
from dataclasses import dataclass
from weakref import WeakValueDictionary

from llmasos.codec import CODECS
from llmasos.config import ATTACH_TIMEOUT_S, SESSION_LEASE_S
from llmasos.deadlines import Silence, within
from llmasos.errors import ConnectionLostError, UsageError, short_id
from llmasos.logs import about, session_label
from llmasos.network import Network, Stream
from llmasos.peer.engine import Engine
from llmasos.peer.scheduler import KvFullError
from llmasos.peer.session import PeerSession
from llmasos.peer.watcher import Watcher
from llmasos.span import Span
from llmasos.wire import (
    MAX_MESSAGE_CHARS,
    AnyMessage,
    Attach,
    Close,
    Draining,
    Failed,
    FrameError,
    Open,
    Opened,
    Ping,
    Pong,
    Replay,
    Reroute,
    Step,
    decode,
    encode,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What this peer serves: a checkpoint and the span of it that the runner holds."""

    model: str
    digest: str
    model_blocks: int
    context_tokens: int


class Handler:
    """Serves inbound streams."""

    def __init__(self, network: Network, engine: Engine, served: Served, watcher: Watcher | None = None) -> None:
        self.draining = False
        self._watcher = watcher or Watcher()
        self._network = network
        self._engine = engine
        self._served = served
        self._sessions: dict[str, PeerSession] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._expected: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        """Sessions that a previous hop has come for before their client; forgotten with the last that waits."""
        self._keys = itertools.count()

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def drain(self) -> None:
        """Refuse new sessions, and ask the clients of the running ones to move them elsewhere."""
        self.draining = True
        for session in self._sessions.values():
            session.tell(Draining())

    async def wait_until_idle(self) -> None:
        """Return once no session is open."""
        await self._empty.wait()

    async def cut_off(self) -> None:
        """End the sessions that are left; their clients notice at once."""
        for session in list(self._sessions.values()):
            await session.hang_up()

    async def __call__(self, stream: Stream) -> None:
        """Serve one stream until it ends."""
        try:
            async with asyncio.timeout(SESSION_LEASE_S):
                first = decode(await stream.receive())
            match first:
                case Open():
                    with about(session=session_label(first.session)):
                        await self._serve_client(stream, first)
                case Attach():
                    with about(session=session_label(first.session)):
                        await self._serve_upstream(stream, first)
                case Ping():
                    await self._serve_pings(stream, first)
                case _:
                    await _refuse(stream, f"a stream cannot begin with {type(first).__name__}")
        except FrameError as error:
            log.info("peer %s sent a bad frame: %s", short_id(stream.peer), error)
            await _refuse(stream, str(error))
        except ConnectionLostError as error:
            log.debug("stream ended: %s", error)
        except TimeoutError:
            log.debug("peer %s fell silent", short_id(stream.peer))

    # --- a client's session ------------------------------------------------------------------------------------------

    async def _serve_client(self, stream: Stream, request: Open) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            log.info("peer %s is refused a session: %s", short_id(stream.peer), refusal.message)
            self._watcher.refused("draining" if refusal.code == "refused" else refusal.code)
            await stream.send(encode(refusal))
            return
        key = f"{next(self._keys)}"
        span = Span(request.start, request.end)
        prefix = self._engine.find_prefix(stream.peer, span, request.prefix, request.tokens)
        try:
            self._engine.admit(key, request.tokens, prefix)
        except KvFullError as error:
            self._watcher.refused("kv_full")
            await stream.send(encode(Failed(code="refused", message=str(error), retry_after_s=1.0)))
            return
        session = PeerSession(key, request, stream, self._network, self._engine, prefix)
        prefix_tokens = prefix.tokens if prefix is not None else 0
        kv_free_tokens = self._engine.scheduler.kv_free_tokens
        session.tell(Opened(kv_free_tokens=kv_free_tokens, prefix_tokens=prefix_tokens, codecs=CODECS))
        self._watcher.found(prefix_tokens)
        self._sessions[request.session] = session
        self._empty.clear()
        if (expected := self._expected.get(request.session)) is not None:
            expected.set()
        try:
            log.debug(
                "a session of %s begins: blocks %s, %d tokens", short_id(stream.peer), session.span, request.tokens
            )
            await self._read_client(stream, session)
        finally:
            log.debug("the session ends")
            del self._sessions[request.session]
            await session.close()
            if not self._sessions:
                self._empty.set()

    def _refusal(self, request: Open) -> Failed | None:
        """Why a session cannot be opened here; None when it can. Asked in order, the first answer counts."""
        held = self._engine.runner.span
        if request.digest != self._served.digest:
            return Failed(code="unsupported", message=f"this peer serves another checkpoint of {self._served.model}")
        if request.dtype != self._engine.runner.dtype:
            return Failed(code="unsupported", message=f"this peer computes in {self._engine.runner.dtype}")
        try:
            wanted = Span(request.start, request.end)
        except UsageError as error:
            return Failed(code="bad_request", message=error.message)
        if wanted not in held:
            return Failed(code="unsupported", message=f"this peer holds the blocks {held}, not {wanted}")
        if request.tokens > self._served.context_tokens:
            limit = self._served.context_tokens
            return Failed(code="bad_request", message=f"{request.tokens} tokens are over the context of {limit}")
        if request.session in self._sessions:
            return Failed(code="bad_request", message="a session of this name is open already")
        if self.draining:
            return Failed(code="refused", message="this peer is draining", retry_after_s=SESSION_LEASE_S)
        return None

    async def _read_client(self, stream: Stream, session: PeerSession) -> None:
        """Take the client's frames until it closes, falls silent for a lease, or breaks the protocol."""
        async with Silence(SESSION_LEASE_S) as silence:
            while True:
                silence.begins()
                message = decode(await stream.receive())
                silence.ends()
                match message:
                    case Step():
                        await session.accept(message)
                    case Ping():  # who does not read must not keep the lease by it
                        await within(SESSION_LEASE_S, stream.send(encode(session.pong(message))))
                    case Reroute():
                        session.reroute(message)
                    case Replay():
                        await session.replay(message)
                    case Close():
                        return
                    case _:
                        await _refuse(stream, f"a client cannot send {type(message).__name__}")
                        return

    # --- the previous hop of a session -------------------------------------------------------------------------------

    async def _serve_upstream(self, stream: Stream, request: Attach) -> None:
        session = await self._session(request.session)
        if session is None:
            await stream.send(encode(Failed(code="unknown_session", message="no such session here")))
            return
        session.attach(stream)
        try:
            while True:
                message = decode(await stream.receive())
                if not isinstance(message, Step):
                    await _refuse(stream, f"a hop cannot send {type(message).__name__}")
                    return
                if session.upstream != stream.peer:
                    await _refuse(stream, "this session takes no steps from you")
                    return
                await session.accept(message)
        finally:
            session.detach(stream)

    async def _session(self, name: str) -> PeerSession | None:
        """The session of that name, waiting a little for one whose `Open` is still on its way."""
        if name not in self._sessions:
            arrived = self._expected.setdefault(name, asyncio.Event())
            try:
                async with asyncio.timeout(ATTACH_TIMEOUT_S):
                    await arrived.wait()
            except TimeoutError:
                return None
        return self._sessions.get(name)

    # --- a stranger who asks how far and how busy we are -------------------------------------------------------------

    async def _serve_pings(self, stream: Stream, message: AnyMessage) -> None:
        scheduler = self._engine.scheduler
        while isinstance(message, Ping):
            pong = Pong(
                nonce=message.nonce,
                padding=message.padding,
                queued=scheduler.queued_tokens,
                sessions=scheduler.active_sessions,
                kv_free_tokens=scheduler.kv_free_tokens,
            )
            async with asyncio.timeout(SESSION_LEASE_S):
                await stream.send(encode(pong))
                message = decode(await stream.receive())


async def _refuse(stream: Stream, message: str) -> None:
    """Tell the other side what was wrong with its frame, if it still listens."""
    try:
        await stream.send(encode(Failed(code="bad_request", message=message[:MAX_MESSAGE_CHARS])))
    except ConnectionLostError:
        log.debug("peer %s did not wait for the refusal", short_id(stream.peer))
