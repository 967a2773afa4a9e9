"""A swarm of real processes on this machine: `llmasos up`, the demo, tests and benchmarks stand on it."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

from llmasos.errors import LLMasOSError, UsageError
from llmasos.span import Span
from llmasos.tasks import TaskSet

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
"""For a peer to load and announce itself; smollm2 takes a few seconds, a machine that is busy a multiple."""
STOP_TIMEOUT_S = 40.0
"""Longer than a peer's default drain time."""
LAST_LINES = 30
"""What is kept of a process's stderr, to explain why it failed."""


@dataclass(slots=True)
class LocalProcess:
    """One process of the swarm. `address` is the multiaddr that it printed."""

    name: str
    process: asyncio.subprocess.Process
    address: str = ""
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    @property
    def peer_id(self) -> str:
        """The id at the end of its multiaddr."""
        return self.address.rpartition("/p2p/")[2]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.process.returncode is None:
            # Not by `Process.send_signal`: it takes the exit code of one that has just ended away from the event loop.
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class LocalSwarm:
    """Starts a bootstrap, then peers on demand, each a process of its own.

    An async context manager: leaving it stops every process, politely first. Where the kernel is Linux, none outlives
    the process that started it, however that ends.
    """

    def __init__(self, *, model: str = "smollm2", threads: int = 1, show_talk: bool = False) -> None:
        """`threads` is how many each process computes with."""
        self.model = model
        self.threads = threads
        self.bootstrap: LocalProcess | None = None
        self.peers: dict[str, LocalProcess] = {}
        self._show_talk = show_talk
        self._tasks = TaskSet()

    async def __aenter__(self) -> Self:
        """Start the bootstrap."""
        self.bootstrap = await self._start("bootstrap", ["-m", "bootstrap"])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        everybody = [*self.peers.values(), *([self.bootstrap] if self.bootstrap else [])]
        for member in everybody:
            member.signal(signal.SIGTERM)
        await asyncio.gather(*(self._end(member) for member in everybody))
        await self._tasks.close()

    @property
    def address(self) -> str:
        """Where to join."""
        assert self.bootstrap is not None, "the swarm has not been started"
        return self.bootstrap.address

    async def start_peer(self, name: str, blocks: str, *options: str) -> LocalProcess:
        """Start a peer and wait until it serves. Raises LLMasOSError with its last words when it does not."""
        arguments = [*self.peer_command(name), "--blocks", blocks, "--model", self.model, "--name", name]
        peer = await self._start(name, [*arguments, "--join", self.address, *options])
        self.peers[name] = peer
        return peer

    def peer_command(self, name: str) -> list[str]:
        """What Python is given to start the peer of that name, before the options of every peer."""
        return ["-m", "llmasos.peer"]

    async def start_peers(
        self, spans: Sequence[Span], ready: Callable[[LocalProcess], None] = lambda peer: None
    ) -> list[LocalProcess]:
        """Start one peer a span, all at once: peer1, peer2, … If one fails, the others are stopped.

        `ready` is told of each as soon as it serves.
        """

        async def start(name: str, span: Span) -> LocalProcess:
            peer = await self.start_peer(name, str(span))
            ready(peer)
            return peer

        starts = [
            asyncio.create_task(start(f"peer{number}", span), name=f"start of peer{number}")
            for number, span in enumerate(spans, start=1)
        ]
        try:
            return await asyncio.gather(*starts)
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.wait(starts)
            raise

    async def kill(self, name: str) -> None:
        """SIGKILL a peer: it says goodbye to nobody."""
        await self._finish(name, signal.SIGKILL)

    async def stop(self, name: str) -> int:
        """SIGTERM a peer and wait for it; its exit code."""
        return await self._finish(name, signal.SIGTERM)

    async def _finish(self, name: str, number: signal.Signals) -> int:
        peer = self.peers.pop(name)
        peer.signal(number)
        return await self._end(peer)

    async def _start(self, name: str, arguments: list[str]) -> LocalProcess:
        spawning = asyncio.create_task(_spawn(arguments, self.threads), name=f"spawn {name}")
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            (await spawning).kill()  # a process that we have no name for would be left behind
            raise
        member = LocalProcess(name, process)
        self._tasks.spawn(self._read_talk(member), f"stderr of {name}")
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                line = await process.stdout.readline()
        except BaseException as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise LLMasOSError(f"{name} was not ready after {READY_TIMEOUT_S:.0f} s\n{_quote(member)}") from None
            raise
        member.address = line.decode().strip()
        if not member.address:
            code = await process.wait()
            await asyncio.sleep(0)  # its last words are read by the task above
            raise LLMasOSError(f"{name} ended with exit code {code}\n{_quote(member)}")
        return member

    async def _read_talk(self, member: LocalProcess) -> None:
        assert member.process.stderr is not None
        async for line in member.process.stderr:
            text = line.decode(errors="replace").rstrip()
            member.stderr.append(text)
            if self._show_talk:
                print(f"  {member.name}: {text}", file=sys.stderr)  # noqa: T201

    async def _end(self, member: LocalProcess) -> int:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await member.process.wait()
        except TimeoutError:
            log.warning("%s did not stop in %.0f s and is killed", member.name, STOP_TIMEOUT_S)
            member.signal(signal.SIGKILL)
            return await member.process.wait()


async def _spawn(arguments: Sequence[str], threads: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Several torch processes with several threads each spin against each other (docs/log.md).
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "GOMAXPROCS": "1"},
        start_new_session=True,  # the terminal's Ctrl-C is ours alone: we stop them in order
        preexec_fn=_end_with_parent if _prctl is not None else None,
    )


_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Runs in the new process: the kernel stops it when we are no more and could not do it ourselves."""
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def split_evenly(blocks: int, peers: int) -> list[Span]:
    """Spans of nearly the same length for that many peers. Raises UsageError when there are more peers than blocks."""
    if not 1 <= peers <= blocks:
        raise UsageError(f"{blocks} blocks cannot be split over {peers} peers")
    edges = [round(blocks * n / peers) for n in range(peers + 1)]
    return [Span(start, end) for start, end in pairwise(edges)]


def _quote(member: LocalProcess) -> str:
    return "\n".join(f"  {member.name}: {line}" for line in member.stderr)
