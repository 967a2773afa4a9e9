"""Commands as somebody types them, and what tests of real processes have in common."""

import asyncio
import io
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from llmasos.cli import begin, build_parser
from llmasos.errors import LLMasOSError, UsageError

LLMASOS = str(Path(sys.executable).parent / "llmasos")


@dataclass(frozen=True)
class Finished:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str


async def command(
    *arguments: str | bytes,
    stdin: bytes = b"",
    timeout_s: float = 120,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command to its end. `llmasos` is the installed one; anything else is given to this Python."""
    program = [LLMASOS, *arguments[1:]] if arguments[0] == "llmasos" else [sys.executable, *arguments]
    process = await asyncio.create_subprocess_exec(
        *program,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env=env,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError:
        process.kill()
        stdout, stderr = await process.communicate()
        pytest.fail(f"{arguments} did not end in {timeout_s} s\n{stdout.decode()}\n{stderr.decode()}")
    assert process.returncode is not None
    return Finished(process.returncode, stdout.decode(), stderr.decode())


async def llmasos_here(*arguments: str) -> Finished:
    """An llmasos command in this process, which has loaded what takes seconds of processor time. That a process ends
    with these codes, and without a traceback, is in tests/test_cli.py."""
    stdout, stderr = io.StringIO(), io.StringIO()
    args = build_parser().parse_args(arguments)
    code = 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            await begin(args)
        except LLMasOSError as error:
            code = 2 if isinstance(error, UsageError) else 1
            sys.stderr.write(str(error))
    return Finished(code, stdout.getvalue(), stderr.getvalue())


def share_a_swarm(items: Iterable[pytest.Item], folder: Path, scope: Literal["module", "session"]) -> None:
    """Tests under `folder` start processes, and share an event loop with the swarm that they run on."""
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            item.add_marker(pytest.mark.asyncio(loop_scope=scope), append=False)
