"""`python -m sim local` as a user runs it: real processes, links, faults, a report, and nothing left behind."""

import asyncio
import json
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from tests.processes.conftest import command

LATENCY_S = 0.04
MARK = "LLMASOS_TEST_MARK"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to see who is still there")
@pytest.mark.parametrize(
    ("moment", "blow"),
    [
        ("starting 2 peers", signal.SIGINT),  # while they load
        ("generating", signal.SIGINT),
        ("generating", signal.SIGKILL),  # nothing can be stopped in order any more
    ],
)
async def test_nothing_is_left_behind(moment: str, blow: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    work = ["--requests", "50", "--clients", "2", "--max-new-tokens", "400", "--latency", "5ms"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "sim", "local", "--peers", "2", *work),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, MARK: mark},
    )
    assert process.stderr is not None
    async with asyncio.timeout(200):
        while moment not in (await process.stderr.readline()).decode():
            assert not process.stderr.at_eof()
        await asyncio.sleep(1)
        assert marked(mark)
        process.send_signal(blow)
        await process.stderr.read()
        assert await process.wait() == (130 if blow is signal.SIGINT else -blow)
        while marked(mark) and blow is signal.SIGKILL:  # noqa: ASYNC110 - the kernel and p2pd's watch take a moment
            await asyncio.sleep(0.1)
    assert marked(mark) == []


def marked(mark: str) -> list[str]:
    """The command lines of all processes that were started under this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has just ended
    return [line for line in found if line]


@pytest.mark.timeout(600)  # eight peers are started, on a machine that may have two busy cores
async def test_links_faults_and_comparisons_are_in_the_report() -> None:
    done = await command(
        *("-m", "sim", "local", "--peers", "2", "--replicas", "2", "--clients", "2", "--requests", "4"),
        *("--max-new-tokens", "24", "--rate", "4", "--latency", f"{1e3 * LATENCY_S:g}ms", "--link", "peer1-peer2=60ms"),
        *("--kill", "peer3@0.5s", "--stop", "peer3@0.7s", "--kill", "peer1@900s", "--speedup", "--json"),
        timeout_s=570,
    )
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["peers"], report["requests"], report["failed"]) == (4, 4, 0)
    assert report["tokens"] == 4 * 24
    assert report["token"]["p50_s"] > 3 * LATENCY_S  # there, between the hops, and back
    assert report["first_token"]["p50_s"] > 5 * LATENCY_S  # a stream is opened first
    assert list(report["utilisation"]) == ["peer1", "peer2", "peer3", "peer4"]
    assert sum(report["utilisation"].values()) > 0
    assert [speedup["peers"] for speedup in report["speedups"]] == [1, 3]
    assert all(speedup["ratio"] > 0 for speedup in report["speedups"])
    assert len(set(report["texts"])) == 1  # one prompt, one text, whatever was done to the peers
    for told in (
        "0.5 s: kill peer3",
        "there is no peer3 any more to stop",
        "the work was done before kill peer1",
        "requests: 100 %",
        "the same work on one peer",
        "the same work on 3 peers",
    ):
        assert told in done.stderr
