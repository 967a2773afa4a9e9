"""The commands as somebody at a terminal of 80 columns sees them."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest_asyncio

from llmasos import LLMasOS
from llmasos.client.events import Event, Rerouted
from sim.local import LocalSwarm
from tests.processes.conftest import command

PATIENCE_S = 90.0
LONG_NAME = "the machine below the stairs that nobody dares to move"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(swarm: LocalSwarm) -> AsyncIterator[LocalSwarm]:
    await asyncio.gather(swarm.start_peer(LONG_NAME, "0:15"), swarm.start_peer("other", "15:30"))
    yield swarm


class Terminal:
    """A command in a terminal of its own, 80 columns wide. Blocking: use it on a thread."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.settings = termios.tcgetattr(self.slave)
        self._seen, self._raw = "", b""
        begin = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from llmasos.cli import main; main()"
        environment = {**os.environ, "HOME": str(home), "TERM": "xterm", "NO_COLOR": "1"}
        environment.pop("COLUMNS", None)
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", begin, *arguments],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, self.slave, number) for number in (0, 1, 2)],
            setsid=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        os.close(self.master)
        os.close(self.slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str) -> str:
        """What is written up to where `pattern` is found; that is then done with."""
        deadline = time.monotonic() + PATIENCE_S
        while (match := re.search(pattern, self._seen)) is None:
            assert time.monotonic() < deadline, f"{pattern} does not come, but {self._seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self._read()
        text, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return text

    def _read(self) -> None:
        """Take in what there is, as text: what moves and colours it is left out."""
        self._raw += os.read(self.master, 65_536).replace(b"\r", b"")
        if not re.search(rb"\x1b[^a-zA-Z]*$", self._raw):  # else the rest of a sequence is still to come
            self._seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._raw.decode(errors="replace"))
            self._raw = b""

    def end(self) -> int:
        """Wait for the command; its exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1])

    def all(self) -> str:
        """Everything that a command writes; it must succeed."""
        code = self.end()
        while select.select([self.master], [], [], 0.2)[0]:
            self._read()
        assert code == 0, self._seen
        return self._seen


async def test_ctrl_c_stops_the_answer_and_not_the_chat(two: LocalSwarm, tmp_path: Path) -> None:
    def talk() -> None:
        with Terminal("chat", "--join", two.address, "--temperature", "0", home=tmp_path) as terminal:
            terminal.until("you > ")
            terminal.type("Tell me a very long story about a river.\n")
            terminal.until(r"\n[^\n]{20,}")
            terminal.type("\x03")
            terminal.until(r"\(stopped\)\n(.*\n)*you > ")
            terminal.type("/max 5\n")
            terminal.until("you > ")
            terminal.type("\x1b[A\x1b[A\n")  # two up in the history: the question
            terminal.until(r"river\.\n")
            terminal.until(r"5 tokens, .*\n+you > ")
            terminal.type("half a line")
            terminal.until("half a line")
            terminal.type("\x03")
            assert "Ctrl-D" in terminal.until(r"again(.*\n)+you > half a line")
            terminal.type(" and the rest\n")
            terminal.until(r"5 tokens, .*\n+you > ")
            terminal.type("\x03")
            terminal.until(r"again(.*\n)+you > ")
            terminal.type("\x03")
            assert terminal.end() == 0
            assert termios.tcgetattr(terminal.slave)[:4] == terminal.settings[:4]

    await asyncio.to_thread(talk)
    history = (tmp_path / ".llmasos_chat_history").read_text().splitlines()
    assert history[-1] == "half a line and the rest"


async def seen(*arguments: str, home: Path) -> str:
    def look() -> str:
        with Terminal(*arguments, home=home) as terminal:
            return terminal.all()

    return await asyncio.to_thread(look)


async def test_what_is_shown_fits_the_terminal(two: LocalSwarm, tmp_path: Path) -> None:
    join = ("--join", two.address)
    status = (await seen("status", *join, home=tmp_path)).splitlines()
    assert max(map(len, status)) <= 80
    assert [line.split()[0] for line in status[2:]] == [
        "peer",
        *(peer.peer_id[-8:] for name, peer in sorted(two.peers.items(), key=lambda item: item[0] == "other")),
    ]
    for arguments in (("route", "--explain", *join), ("doctor", *join), ("models", *join)):
        lines = (await seen(*arguments, home=tmp_path)).splitlines()
        assert [line for line in lines if len(line) > 80] == []


async def test_a_route_is_explained(two: LocalSwarm) -> None:
    done = await command("llmasos", "route", "--explain", "--join", two.address)
    assert done.code == 0, done.stderr
    first, last = (line.split("\t") for line in done.stdout.splitlines())
    assert (first[0], last[0]) == ("0:15", "15:30")
    assert {first[1], last[1]} == {peer.peer_id for peer in two.peers.values()}
    assert "no other route" in done.stderr
    told = json.loads((await command("llmasos", "route", "--json", "--join", two.address)).stdout)
    assert [hop["blocks"] for hop in told["route"]["hops"]] == ["0:15", "15:30"]
    costs = [hop["total_s"] for hop in told["route"]["hops"]]
    assert told["route"]["total_s"] >= max(costs) > 0
    missing = await command("llmasos", "route", "--dtype", "bfloat16", "--join", two.address)
    assert missing.code == 1
    assert "0:30" in missing.stderr


async def test_a_trace_of_a_generation(two: LocalSwarm, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    options = ("--join", two.address, "--max-new-tokens", "6", "--trace", str(file))
    done = await command("llmasos", "generate", "The world is", *options)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith(" a ")
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["args"]["name"].split()[0] for event in events if event["ph"] == "M"} >= {"0:15", "15:30"}
    spent_us = {
        part: sum(
            event["ts"] * (1 if event["ph"] == "e" else -1)
            for event in events
            if event["name"] == part and event["pid"]
        )
        for part in ("queue", "compute", "network")
    }
    assert spent_us["compute"] > 1_000  # six steps of thirty blocks take at least that
    assert spent_us["network"] > 0
    told = json.loads((await command("llmasos", "generate", "The world is", *options, "--json")).stdout)
    assert [hop["blocks"] for hop in told["trace"]["hops"]] == ["0:15", "15:30"]
    nowhere = await command("llmasos", "generate", "x", *options[:4], "--trace", "/nowhere/trace.json")
    assert nowhere.code == 2
    assert "/nowhere/trace.json cannot be written" in nowhere.stderr


def name_of(swarm: LocalSwarm, end_of_id: str) -> str:
    return next(name for name, peer in swarm.peers.items() if peer.peer_id.endswith(end_of_id))


async def test_whoever_talks_or_calls_is_told_of_a_lost_peer(two: LocalSwarm, tmp_path: Path) -> None:
    """In the terminal as a line of its own, in Python as an event; the text goes on in both."""
    await two.start_peer("spare", "15:30")
    loop = asyncio.get_running_loop()

    def kill(end_of_id: str) -> None:
        asyncio.run_coroutine_threadsafe(two.kill(name_of(two, end_of_id)), loop).result()

    def start(blocks: str) -> None:
        asyncio.run_coroutine_threadsafe(two.start_peer("late", blocks), loop).result()

    def talk() -> None:
        with Terminal("chat", "--join", two.address, "--max-new-tokens", "3", home=tmp_path) as terminal:
            terminal.until("you > ")
            terminal.type("Hi\n")
            terminal.until(r"tokens/s\n+you > ")
            terminal.type("/route\n")
            route = terminal.until(r"15:30 on \w{8}\n")
            terminal.until("you > ")
            terminal.type("/max 120\n")
            terminal.until("you > ")
            terminal.type("Tell me a very long story about a river.\n")
            terminal.until(r"river\.\n[^\n]{20,}")
            kill(route.strip()[-8:])
            terminal.until(r"\n\(rerouted: .*\)\n")
            terminal.until(r"tokens/s\n+you > ")
            terminal.type("\x04")
            assert terminal.end() == 0

    def call() -> None:
        events: list[Event] = []
        with LLMasOS(endpoint=two.address, on_event=events.append) as client:
            whole = client.generate("Once upon a time", max_new_tokens=60)
            pieces = client.stream_text("Once upon a time", max_new_tokens=60)
            text = "".join(next(pieces) for _ in range(5))
            start("15:30")  # so far one peer alone has these blocks, and with them the session
            kill(whole.route[1].peer)
            text += "".join(pieces)
        assert text == whole.text
        assert any(isinstance(event, Rerouted) for event in events)

    await asyncio.to_thread(talk)
    await asyncio.to_thread(call)
