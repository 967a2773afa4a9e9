"""One libp2p daemon (p2pd) as a child process, and the calls on its control socket.

p2pd does the network: encrypted, authenticated connections and streams. Each stream comes to us as a unix socket of
its own. hivemind has a binding for this; it leaks sockets when a call is cancelled, writes a length byte by byte and
starts p2pd in the terminal's process group, where Ctrl-C kills it under our feet. So only the DHT goes through it
(`Daemon.p2p`), and streams are opened and accepted here.

p2pd ends when its last persistent control connection does: it never outlives us, whatever kills us.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmasos.errors import ConnectionLostError, LLMasOSError, UsageError
from llmasos.identity import Identity
from llmasos.network import PeerId
from llmasos.p2p_hivemind import P2P, Multiaddr, PeerID, p2pd_path, p2pd_pb2
from llmasos.p2p_stream import OPEN, FrameStream
from llmasos.tasks import TaskSet

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 15.0
"""p2pd starts in 0.15 to 0.5 s (measured); a machine under heavy load gets more."""
STOP_TIMEOUT_S = 3.0
CONTROL_TIMEOUT_S = 5.0

OnStream = Callable[[FrameStream], None]


_FOLDER_PREFIX = "llmasos-p2pd-"
_STALE_AFTER_S = 60.0


class DaemonError(Exception):
    """p2pd refused a request, or is gone."""


class Daemon:
    """A running p2pd. `died` is set when it ends, whoever ended it."""

    p2p: Any  # hivemind's handle on the same p2pd, for its DHT
    addresses: tuple[str, ...]

    def __init__(self, folder: Path, on_stream: OnStream) -> None:
        self.died = asyncio.Event()
        self._folder = folder
        self._control = folder / "control.sock"
        self._inbound = folder / "inbound.sock"
        self._on_stream = on_stream
        self._tasks = TaskSet()
        self._said = ""
        self._child: asyncio.subprocess.Process | None = None
        self._server: asyncio.Server | None = None
        self.p2p = None
        self.addresses = ()

    @classmethod
    async def start(cls, identity: Identity, listen_on: Sequence[str], on_stream: OnStream) -> "Daemon":
        """Start p2pd as `identity`; it listens on these multiaddrs, or on none and takes no part in the peer DHT."""
        _sweep()
        daemon = cls(Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX)), on_stream)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await daemon._start(identity, listen_on)
        except TimeoutError:
            await daemon.stop()
            said = daemon._said.strip() or "nothing"
            raise LLMasOSError(f"the p2p daemon did not start in {START_TIMEOUT_S:g} s; it said: {said}") from None
        except BaseException:
            await daemon.stop()
            raise
        return daemon

    async def _start(self, identity: Identity, listen_on: Sequence[str]) -> None:
        # 1. the process, in a session of its own, with its key from a file that lives until it has been read
        key_file = self._folder / "identity"
        identity.save(key_file)
        options = {
            "listen": f"/unix{self._control}",
            "id": key_file,
            "connManager": 1,
            "idleTimeout": f"{START_TIMEOUT_S:g}s",
            "persistentConnMaxMsgSize": 4 * 2**20,
            **dict.fromkeys(("b", "autonat", "natPortMap", "relay", "relayService", "autoRelay"), 0),
            **(
                {"dhtServer": 1, "hostAddrs": ",".join(listen_on)}
                if listen_on
                else {"dhtClient": 1, "noListenAddrs": 1}
            ),
        }
        self._child = await asyncio.create_subprocess_exec(
            p2pd_path(),
            *(f"-{name}={value}" for name, value in options.items()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"GOLOG_LOG_LEVEL": "error", **os.environ},
            start_new_session=True,
        )
        # 2. wait until it says who it is
        ready = asyncio.Event()
        self._tasks.spawn(self._watch(self._child, ready), name="watch p2pd")
        await ready.wait()
        if self.died.is_set():
            self._raise_why()
        key_file.unlink()
        # 3. its addresses, hivemind's connection, and the socket on which it hands us inbound streams
        reply = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        self.addresses = tuple(str(Multiaddr(address)) for address in reply.identify.addrs)
        self.p2p = await P2P.replicate(Multiaddr(f"/unix{self._control}"))
        self._server = await asyncio.get_running_loop().create_unix_server(self._accept, path=self._inbound)

    def _raise_why(self) -> None:
        said = self._said.strip() or "nothing"
        if "address already in use" in said or "failed to listen" in said:
            raise UsageError(
                "the address to listen on is in use or is not ours",
                hint="choose another one with --host and --port (--port 0 takes any free port)",
            )
        raise LLMasOSError(f"the p2p daemon ended at its start; it said: {said}")

    async def _watch(self, child: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        """Read what p2pd says (only its last words are kept) until it ends."""
        assert child.stdout is not None
        while chunk := await child.stdout.read(65_536):
            text = chunk.decode(errors="replace")
            self._said = (self._said + text)[-2_000:]
            logger.debug("p2pd: %s", text.rstrip())
            if "Peer ID:" in self._said:
                ready.set()
        await child.wait()
        self.died.set()
        ready.set()
        if self.p2p is not None:  # hivemind's calls have no end of their own when p2pd is gone
            for call in list(self.p2p._client.control._pending_calls.values()):
                if not call.done():
                    call.set_exception(DaemonError("our own p2p daemon died"))

    async def stop(self) -> None:
        """End p2pd and everything here. May be called twice, and after p2pd has died."""
        if self._server is not None:
            self._server.close()
        if self.p2p is not None:
            control = self.p2p._client.control
            await self.p2p.shutdown()
            await asyncio.gather(control._read_task, control._write_task, return_exceptions=True)
        child = self._child
        if child is not None and child.returncode is None:
            _signal(child, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await child.wait()
            except TimeoutError:
                _signal(child, signal.SIGKILL)
                await child.wait()
        self.died.set()
        await self._tasks.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- streams ---

    def register(self, protocol: str) -> None:
        """Have p2pd hand us the streams of `protocol`. Blocks for the millisecond that takes, so that it is done
        when this returns and no early caller is turned away."""
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_HANDLER,
            streamHandler=p2pd_pb2.StreamHandlerRequest(
                addr=Multiaddr(f"/unix{self._inbound}").to_bytes(), proto=[protocol], balanced=False
            ),
        )
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(CONTROL_TIMEOUT_S)
            try:
                control.connect(str(self._control))
                control.sendall(_pack(request))
                reply = control.makefile("rb")
                size = _varint(lambda: reply.read(1))
                _check(p2pd_pb2.Response.FromString(reply.read(size)))
            except OSError as error:
                raise DaemonError(str(error)) from error

    async def dial(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Connect to a peer at these addresses, unless there is a connection. Raises DaemonError."""
        connect = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer).to_bytes(), addrs=[Multiaddr(address).to_bytes() for address in addresses]
        )
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """A stream to a peer that serves `protocol`. Raises DaemonError."""
        opening = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol])
        stream, _ = await self._exchange(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening))
        stream.peer, stream.protocol = peer, protocol
        stream.write_raw(OPEN)
        return stream

    def _accept(self) -> FrameStream:
        stream = FrameStream()
        self._tasks.spawn(self._greet(stream), name="inbound stream")
        return stream

    async def _greet(self, stream: FrameStream) -> None:
        """p2pd first says whose stream it is; it knows, from the handshake of the connection."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                info = p2pd_pb2.StreamInfo.FromString(await stream.hello)
        except (TimeoutError, ConnectionLostError) as error:
            logger.debug("an inbound stream ended before it began: %s", error)
            stream.abort()
            return
        except BaseException:
            stream.abort()
            raise
        stream.peer, stream.protocol = PeerId(PeerID(info.peer).to_base58()), info.proto
        self._on_stream(stream)

    # --- the control socket ---

    async def _ask(self, request: Any) -> Any:
        stream, reply = await self._exchange(request)
        stream.abort()
        return reply

    async def _exchange(self, request: Any) -> tuple[FrameStream, Any]:
        """One request on a connection of its own, which is a libp2p stream afterwards if that was asked for."""
        loop = asyncio.get_running_loop()
        try:
            _, stream = await loop.create_unix_connection(FrameStream, str(self._control))
        except OSError as error:
            raise DaemonError(f"our own p2p daemon does not answer ({error.strerror})") from error
        try:
            stream.write_raw(_pack(request))
            return stream, _check(p2pd_pb2.Response.FromString(await stream.hello))
        except ConnectionLostError as error:
            raise DaemonError("our own p2p daemon hung up") from error
        except BaseException:
            stream.abort()
            raise


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a child a signal. `Process.terminate` would first ask whether it has ended, and so take the answer away from
    the event loop, which then complains that it knows no such child: p2pd often ends by itself just then."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)


def _sweep() -> None:
    """Remove the folders that processes killed by force have left: those in which no p2pd listens any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as control:
            if time.time() - folder.stat().st_mtime < _STALE_AFTER_S:
                continue  # it may be starting
            try:
                control.settimeout(CONTROL_TIMEOUT_S)
                control.connect(str(folder / "control.sock"))
            except (ConnectionRefusedError, FileNotFoundError):
                shutil.rmtree(folder, ignore_errors=True)


def _varint(read_byte: Callable[[], bytes]) -> int:
    size = shift = 0
    while byte := read_byte():
        size |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return size
    raise DaemonError("our own p2p daemon hung up")


def _pack(message: Any) -> bytes:
    body: bytes = message.SerializeToString()
    size, prefix = len(body), bytearray()
    while size >= 0x80:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + body


def _check(reply: Any) -> Any:
    if reply.type == p2pd_pb2.Response.ERROR:
        raise DaemonError(reply.error.msg)
    return reply
