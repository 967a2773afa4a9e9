"""How LLMasOS talks to people: stdout carries data, stderr carries talk, and an error says what to type next."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import uvloop
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llmasos.errors import LLMasOSError, UsageError
from llmasos.logs import JsonFormatter

talk = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""Everything that is not data. Colours only on a terminal, and never with NO_COLOR."""

log = logging.getLogger(__name__)

LOG_FORMATS = ("pretty", "json")
LOG_FORMAT = "LLMASOS_LOG_FORMAT"

_talk_is_logged = False

QUIET_S = 2.0
"""A wait shorter than this needs no progress bar."""

ProgressCallback = Callable[[int, int], None]

DEBUG_HELP = "log everything, and show tracebacks"


def say(text: str = "", *, style: str | None = None, level: int = logging.INFO) -> None:
    """A line of talk; square brackets in it mean nothing."""
    if _talk_is_logged:
        log.log(level, "%s", text.strip())
    else:
        talk.print(text, style=style, markup=False)


def show(data: str) -> None:
    """A line of data."""
    sys.stdout.write(data + "\n")
    sys.stdout.flush()


def tell(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = ()) -> None:
    """A table of talk, numbers to the right. The column `name` gives way where the terminal is narrow."""
    table = Table(box=None, pad_edge=False)
    for column in head:
        justify: Literal["left", "right"] = "left" if column in left or column == "name" else "right"
        table.add_column(column, justify=justify, no_wrap=column != "name")
    for row in rows:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))  # Text: names are not markup
    talk.print(table)


def _form(description: str, example: str) -> dict[str, Any]:
    return {
        "description": description,
        "epilog": f"example:\n{example}",
        "formatter_class": RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def parser(prog: str, description: str, example: str) -> ArgumentParser:
    """An argument parser whose help ends with an example. No option is short for another: `--seed` is not `--seeds`."""
    made = ArgumentParser(prog=prog, **_form(description, example))
    made.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    return made


def subcommand(commands: Any, name: str, description: str, example: str) -> ArgumentParser:
    """One more command of a parser's `commands`; it takes --debug as well, since that is typed last."""
    made: ArgumentParser = commands.add_parser(
        name,
        help=description,
        **_form(description, example),
    )
    made.add_argument("--debug", action="store_true", default=SUPPRESS, help=DEBUG_HELP)
    return made


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def seconds(text: str) -> float:
    """An argparse type: a finite number of seconds, zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def run(work: Callable[[Namespace], Coroutine[Any, Any, None] | None], args: Namespace) -> NoReturn:
    """Run a command, async or not, to its end and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        if (unfinished := work(args)) is not None:
            uvloop.run(unfinished)
    except LLMasOSError as error:
        if args.debug:
            talk.print_exception()
        say(f"error: {error.message}", style="bold red", level=logging.ERROR)
        if error.hint:
            say(f"  {error.hint}", level=logging.ERROR)
        leave(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        leave(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our stdout has gone
        leave(1)
    leave(0)


def leave(code: int) -> NoReturn:
    """Exit."""
    raise SystemExit(code)


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM or Ctrl-C sets. A second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


@contextmanager
def progress(what: str) -> Iterator[ProgressCallback]:
    """A callback for (done, total) bytes: a bar on a terminal, a line per tenth elsewhere, nothing if it is quick."""
    begin = time.monotonic()
    if talk.is_terminal and not _talk_is_logged:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=talk, transient=True) as bar:
            task = bar.add_task(what, total=None, visible=False)

            def update(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, visible=time.monotonic() - begin > QUIET_S)

            yield update
        return
    said = 0

    def report(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total if total else 10
        if tenth > said and time.monotonic() - begin > QUIET_S:
            said = tenth
            say(f"{what}: {10 * tenth} %")

    yield report


def cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    """For a port that is taken, or a host that is not here."""
    if isinstance(error, socket.gaierror):
        return UsageError(f"{host} is no address of this machine: {error.strerror}", hint="try --host 127.0.0.1")
    why = os.strerror(error.errno) if error.errno else str(error)  # asyncio's own words would repeat the address
    if error.errno != errno.EADDRINUSE:
        return UsageError(f"cannot listen on {host} port {port}: {why}", hint="try --host 127.0.0.1, and --port 0")
    hint = f"is another gateway running? try --port {port + 1 if port < 65_535 else 0}"
    return UsageError(f"cannot listen on {host} port {port}: {why}", hint=hint)


def add_log_format(command: ArgumentParser) -> None:
    """The option of every command that stays."""
    command.add_argument("--log-format", choices=LOG_FORMATS, help=f"(default: ${LOG_FORMAT}, else pretty)")


def set_up_logging(*, debug: bool, form: str | None = None) -> None:
    """Send logs to stderr: ours from INFO, those of libraries from WARNING; everything with `debug`.

    `form` pretty is for people. With json, or $LLMASOS_LOG_FORMAT, each line of stderr is an object, talk as well.
    """
    global _talk_is_logged
    form = form or os.environ.get(LOG_FORMAT) or "pretty"
    if form not in LOG_FORMATS:
        say(f"error: {LOG_FORMAT} is {form!r}: it must be {' or '.join(LOG_FORMATS)}", style="bold red")
        leave(2)
    handler = logging.StreamHandler(sys.stderr)
    _talk_is_logged = form == "json"
    if _talk_is_logged:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("llmasos").setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("asyncio", "hivemind"):
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.WARNING)
