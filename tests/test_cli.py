"""The command lines: what they take, what they print where, and how they end. No swarm is needed for any of it."""

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootstrap.__main__ import build_parser as bootstrap_parser
from llmasos import __version__
from llmasos.cli import build_parser as llmasos_parser
from llmasos.client.options import client_config, with_address
from llmasos.config import ClientConfig, PeerConfig
from llmasos.console import progress, run, say, whole
from llmasos.errors import LLMasOSError, MissingBlocksError, UsageError
from llmasos.peer.__main__ import build_parser as peer_parser
from sim.__main__ import build_parser as sim_parser

ROOT = Path(__file__).parents[1]
NOBODY = "/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWPk51brrtu3iCxm9Q5MUSArhMDM6ZsuF3ifu92U5HNJna"
ASK_GATEWAY = ["generate", "Hello", "--join", "http://127.0.0.1:8000"]
PEER = ["-m", "llmasos.peer"]
LLMASOS = ["-m", "llmasos.cli"]
BOOTSTRAP = ["-m", "bootstrap"]


def command(
    *arguments: str, env: dict[str, str] | None = None, stdin: bytes | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `env` is added to ours."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, env={**os.environ, **(env or {})}, input=stdin
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def parsers_with_their_commands() -> Iterator[argparse.ArgumentParser]:
    waiting = [bootstrap_parser(), llmasos_parser(), peer_parser(), sim_parser()]
    while waiting:
        parser = waiting.pop()
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


PARSERS = list(parsers_with_their_commands())


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_help_ends_with_an_example_that_this_parser_takes(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    assert "example:" in text
    example = text.partition("example:")[2]
    assert parser.prog in example or parser.prog.split()[0] in example


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_option_is_explained(parser: argparse.ArgumentParser) -> None:
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert [name for name in unexplained if name != "command"] == []  # commands have a help each


@pytest.mark.parametrize("arguments", [PEER, LLMASOS, BOOTSTRAP, ["-m", "sim"]], ids=" ".join)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    """Else it would take seconds."""
    done = command("-X", "importtime", *arguments, "--help")
    assert done.returncode == 0
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)


# --- what is promised to scripts ------------------------------------------------------------------------------------


def test_the_options_of_a_peer() -> None:
    line = (
        "--blocks 0:12 --model m --join a --join b --host h --port 7 --identity f --name n --device cpu "
        "--dtype float32 --quantize none --kv-tokens 9 --max-batch-tokens 5 --log-format json"
    )
    parsed = peer_parser().parse_args(shlex.split(line))
    assert (parsed.blocks, parsed.join, parsed.port, parsed.identity) == ("0:12", ["a", "b"], 7, Path("f"))


def test_the_defaults_of_a_peer_are_those_of_its_config() -> None:
    parsed = peer_parser().parse_args(["--blocks", "0:12"])
    config = PeerConfig()
    for name in ("model", "name", "device", "dtype", "quantize", "max_blocks", "kv_tokens", "max_batch_tokens"):
        assert getattr(parsed, name) == getattr(config, name), name
    assert parsed.drain_timeout == config.drain_timeout_s
    assert (parsed.host, parsed.port) == (config.network.host, config.network.port)


def test_the_options_of_generate() -> None:
    line = (
        "generate Hello --join a --model m --max-new-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 5 "
        "--stop x --stop y --json"
    )
    parsed = llmasos_parser().parse_args(shlex.split(line))
    assert (parsed.prompt, parsed.join, parsed.stop, parsed.json) == ("Hello", ["a"], ["x", "y"], True)


def test_the_defaults_of_generate() -> None:
    parsed = llmasos_parser().parse_args(["generate", "Hello", "--join", "a"])
    assert (parsed.model, parsed.max_new_tokens, parsed.temperature, parsed.seed) == ("smollm2", 64, 0.0, None)


@pytest.mark.parametrize("name", ["generate Hello", "chat", "gateway", "route"])
def test_who_computes_in_which_numbers_can_be_chosen(name: str) -> None:
    parse = llmasos_parser().parse_args
    chosen = parse([*name.split(), "--join", "a", "--dtype", "bfloat16", "--quantization", "int8"])
    assert (chosen.dtype, chosen.quantization) == ("bfloat16", "int8")
    assert client_config(chosen) == ClientConfig(dtype="bfloat16", quantization="int8")
    assert client_config(parse([*name.split(), "--join", "a"])) == ClientConfig()


@pytest.mark.parametrize("arguments", [["--debug", "status", "--join", "a"], ["status", "--join", "a", "--debug"]])
def test_debug_may_stand_before_or_behind_the_command(arguments: list[str]) -> None:
    assert llmasos_parser().parse_args(arguments).debug is True


def test_without_debug_there_is_none() -> None:
    assert llmasos_parser().parse_args(["status", "--join", "a"]).debug is False


def test_the_version_goes_to_stdout() -> None:
    done = command(*LLMASOS, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llmasos {__version__}\n", "")


# --- wrong usage: exit code 2, nothing on stdout, no traceback -------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([*PEER], "--blocks"),
        ([*PEER, "--blocks", "5:3"], "the end must lie behind the start"),
        ([*PEER, "--blocks", "all"], "is not a range of blocks"),
        ([*PEER, "--blocks", "0:3", "--port", "65536"], "no ports above 65535"),
        ([*PEER, "--blocks", "0:3", "--port", "-1"], "whole number"),
        ([*PEER, "--blocks", "0:3", "--kv-tokens", "0"], "at least 1"),
        ([*PEER, "--blocks", "0:3", "--quantize", "int2"], "invalid choice"),
        ([*PEER, "--blocks", "0:3", "--dtype", "float8"], "invalid choice"),
        ([*PEER, "--blocks", "0:3", "--colour", "red"], "unrecognized arguments"),
        ([*BOOTSTRAP, "--host", "nowhere"], "is not an IP address"),
        ([*LLMASOS], "COMMAND"),
        ([*LLMASOS, "dance"], "invalid choice"),
        ([*LLMASOS, "status"], "--join"),
        ([*LLMASOS, "status", "--join", "127.0.0.1:4001"], "is not the multiaddr of a peer"),
        ([*LLMASOS, "chat", "--join", "http://127.0.0.1:8000"], "not of a gateway"),
        ([*LLMASOS, *ASK_GATEWAY, "--dtype", "float32"], "--dtype: that is the gateway's choice"),
        ([*LLMASOS, *ASK_GATEWAY, "--codec", "int8", "--draft", "m"], "--codec, --draft: that is the gateway's choice"),
        ([*LLMASOS, *ASK_GATEWAY, "--quantization", "int8"], "--quantization: that is the gateway's choice"),
        ([*LLMASOS, "status", "--join", NOBODY.format(port=9), "--api-key", "k"], "--api-key is for gateways"),
        ([*LLMASOS, "generate", "Hello", "--join", NOBODY.format(port=9), "--trace", "/no/t"], "/no/t cannot be"),
        ([*LLMASOS, "route", "--join", NOBODY.format(port=9), "--prompt-tokens", "8192"], "context of the model 8192"),
        ([*LLMASOS, "generate", "Hello", "--join", "x", "--max-new-tokens", "0"], "at least 1"),
        ([*LLMASOS, "generate", "Hello", "--join", "x", "--temperature", "warm"], "invalid float"),
        (["-m", "sim", "local", "--peers", "0"], "at least 1"),
        (["-m", "sim", "local", "--peer", "3"], "unrecognized arguments"),  # no option has a second, shorter name
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_wrong_usage(arguments: list[str], why: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert why in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", [["--debug", "status"], ["status", "--debug"]])
def test_debug_shows_where_it_went_wrong(where: list[str]) -> None:
    done = command(*LLMASOS, *where, "--join", "127.0.0.1:4001")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "is not the multiaddr of a peer" in done.stderr


def test_a_prompt_that_is_not_text() -> None:
    done = command(*LLMASOS, "generate", "-", "--join", NOBODY.format(port=free_port()), stdin=b"caf\xe9")
    assert done.returncode == 2
    assert "not UTF-8" in done.stderr
    assert "byte 3" in done.stderr


@pytest.mark.parametrize("arguments", [["up"], ["gateway", "--join", NOBODY.format(port=9)]], ids=" ".join)
def test_a_port_that_is_taken_is_told_before_a_swarm_is_started_for_it(arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command(*LLMASOS, *arguments, "--port", str(port))
    assert (done.returncode, done.stdout) == (2, "")
    first, hint = done.stderr.splitlines()
    assert first == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert f"--port {port + 1}" in hint


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_here_is_told_as_well(host: str) -> None:
    done = command(*LLMASOS, "up", "--host", host)
    assert (done.returncode, done.stdout) == (2, "")
    first, hint = done.stderr.splitlines()
    assert host in first
    assert "--host 127.0.0.1" in hint


@pytest.mark.parametrize("name", ["generate", "chat", "status", "route", "gateway", "models", "doctor"])
def test_a_mistyped_address_is_told_before_anything_is_loaded(name: str) -> None:
    words = ["Hello"] if name == "generate" else []
    done = command("-X", "importtime", *LLMASOS, name, *words, "--join", "127.0.0.1:4001")
    assert done.returncode == 2
    assert "is not the multiaddr of a peer" in done.stderr
    assert not re.search(r"\| +(torch|transformers|hivemind)$", done.stderr, re.MULTILINE)


def test_a_hint_is_pasted_as_it_is() -> None:
    address = NOBODY.format(port=4001)
    hint = MissingBlocksError("smollm2", ["3:30"]).wanting("bfloat16", "int8").hint
    assert with_address(hint, [address, "another"]) == hint.replace("MULTIADDR", address)
    assert with_address(hint, ["http://127.0.0.1:8000"]) == hint  # which peer stands behind it is not known
    assert with_address("try --model smollm2", [address]) == "try --model smollm2"


INTERRUPTED = """
import runpy, signal, sys

class CtrlC:
    def find_spec(self, name, *_):
        if name == "llmasos.console":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
sys.meta_path.insert(0, CtrlC())
sys.argv = ["llmasos", "--version"]
runpy.run_module("llmasos", run_name="__main__")
"""


def test_ctrl_c_before_the_command_is_there_is_quiet() -> None:
    done = command("-c", INTERRUPTED)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# --- a swarm without peers ------------------------------------------------------------------------------------------


@pytest.mark.swarm
def test_an_empty_swarm_has_no_models() -> None:
    process = subprocess.Popen(
        [sys.executable, *BOOTSTRAP], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        done = command(*LLMASOS, "status", "--json", "--join", address)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"models": []})
        shown = command(*LLMASOS, "status", "--join", address)
        assert (shown.returncode, shown.stdout) == (0, "")
        nothing = command(*LLMASOS, "route", "--join", address)
        assert (nothing.returncode, nothing.stdout) == (1, "")
        for stderr in (shown.stderr, nothing.stderr):
            assert f"python -m llmasos.peer --blocks auto --model smollm2 --join {address}\n" in stderr
    finally:
        process.terminate()
        rest, talk = process.communicate(timeout=30)
    assert process.returncode == 0
    assert rest == ""  # one line on stdout, and nothing after it
    assert f"--join {address}" in talk


# --- the console ----------------------------------------------------------------------------------------------------


def outcome(error: BaseException | None, *, debug: bool = False) -> int:
    """The exit code of a command that ends with this error."""

    async def work(args: argparse.Namespace) -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run(work, argparse.Namespace(debug=debug))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (LLMasOSError("it broke"), 1), (UsageError("not like this"), 2), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error: BaseException | None, code: int) -> None:
    assert outcome(error) == code


def test_an_error_is_a_message_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    outcome(LLMasOSError("[1] it broke", hint="try [bold]this[/bold]"))
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "error: [1] it broke\n  try [bold]this[/bold]\n"


def test_what_is_said_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("a peer named [red]fire[/red] :smile:")
    assert capsys.readouterr().err == "a peer named [red]fire[/red] :smile:\n"


COLOURED = "from llmasos.console import say; say('ready', style='bold green')"


@pytest.mark.parametrize(("env", "coloured"), [({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False), ({}, False)])
def test_colours_are_for_terminals_and_never_with_no_color(env: dict[str, str], coloured: bool) -> None:
    clean = {"FORCE_COLOR": "", "NO_COLOR": "", "TERM": "xterm-256color"}
    done = command("-c", COLOURED, env={**clean, **env})
    assert ("\x1b[" in done.stderr) is coloured
    assert "ready" in done.stderr


TABLE = (
    "from llmasos.console import tell\n"
    "rows = [['12:30', 'a machine in the cellar of a very long name [bold]', '1.234'], ['0:12', 'b', '131,072']]\n"
    "tell(('blocks', 'name', 'kv free'), rows, left=('blocks',))"
)


@pytest.mark.parametrize(("columns", "name"), [(40, "a machine in the cella…"), (100, "very long name [bold]")])
def test_a_row_of_a_table_is_a_line(columns: int, name: str) -> None:
    """A long name is cut, not folded; numbers never are."""
    lines = command("-c", TABLE, env={"COLUMNS": str(columns)}).stderr.splitlines()
    assert len(lines) == 3
    assert all(len(line) <= columns for line in lines)
    assert name in lines[1]
    assert [line.split()[0] for line in lines] == ["blocks", "12:30", "0:12"]
    assert lines[1].endswith("1.234")
    assert lines[2].endswith("131,072")


@pytest.mark.parametrize(("least", "text", "value"), [(0, "0", 0), (1, "12", 12), (1, "0", None), (0, "-1", None)])
def test_whole_numbers(least: int, text: str, value: int | None) -> None:
    if value is not None:
        assert whole(least)(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError, match=f"at least {least}"):
        whole(least)(text)


@pytest.mark.parametrize("text", ["1.5", "", "ten", "1e3", "∞"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
        whole(0)(text)


def test_quick_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("loading") as report:
        for done in range(0, 101, 10):
            report(done, 100)
    assert capsys.readouterr().err == ""


def test_long_work_shows_a_line_a_tenth(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.console.QUIET_S", -1.0)
    with progress("loading") as report:
        for done in range(101):
            report(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"loading: {tenth} %" for tenth in range(10, 101, 10)]


def test_nothing_is_written_when_stdout_is_closed_early() -> None:
    """`llmasos … | head -1` ends without a traceback."""
    script = "from llmasos.console import run, show\nimport argparse\nasync def w(a):\n"
    script += "    for n in range(100000): show('line')\nrun(w, argparse.Namespace(debug=False))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        assert process.returncode == 1
        assert process.stderr.read() == b""
