"""A line of a log says what it is about."""

import asyncio
import json
import logging
import os
import subprocess
import sys

import pytest

from llmasos.logs import JsonFormatter, about, session_label

log = logging.getLogger("llmasos.tests")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.handler.setFormatter(JsonFormatter())
    caplog.set_level(logging.INFO, "llmasos")
    return caplog


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    return [json.loads(line) for line in caplog.text.splitlines()]


async def test_ids_hold_for_a_task_and_for_those_it_starts(lines: pytest.LogCaptureFixture) -> None:
    async def work(name: str) -> None:
        with about(session=name):
            await asyncio.sleep(0)
            await asyncio.create_task(asyncio.to_thread(log.info, "of %s", name))

    with about(request="r"):
        await asyncio.gather(work("a"), work("b"))
        log.info("of the request")
    log.info("of nothing")
    found = [(entry["message"], entry.get("request"), entry.get("session")) for entry in entries(lines)]
    assert sorted(found[:2]) == [("of a", "r", "a"), ("of b", "r", "b")]
    assert found[2:] == [("of the request", "r", None), ("of nothing", None, None)]


def test_what_somebody_writes_cannot_end_the_line(lines: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError('"}\n{"level": "info"}')
    except ValueError:
        log.exception("a peer is called %s", '\n{"message": "I am the root"}')
    (entry,) = entries(lines)
    assert entry["level"] == "error"
    assert "I am the root" in entry["message"]
    assert "ValueError" in entry["traceback"]


def test_a_session_is_called_the_same_everywhere_and_its_name_stays_secret() -> None:
    name = "5f" * 16
    assert session_label(name) == session_label(f"{name}.0") == session_label(f"{name}.7")
    assert session_label(name) not in name
    assert session_label(name) != session_label("6" + name[1:])


SAYS = "from llmasos.console import run, say, set_up_logging; import argparse\n" + (
    "from llmasos.errors import UsageError\nasync def work(args):\n    say('  ready [bold]')\n"
    "    raise UsageError('wrong', hint='do this')\n"
    "set_up_logging(debug=False, form={form!r}); run(work, argparse.Namespace(debug=False))"
)


def said(form: str | None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SAYS.format(form=form)], capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize(("form", "env"), [("json", {}), (None, {"LLMASOS_LOG_FORMAT": "json"})])
def test_with_json_talk_is_logged_too(form: str | None, env: dict[str, str]) -> None:
    done = said(form, **env)
    assert done.returncode == 2
    found = [(entry["level"], entry["message"]) for entry in map(json.loads, done.stderr.splitlines())]
    assert found == [("info", "ready [bold]"), ("error", "error: wrong"), ("error", "do this")]


def test_text_is_the_default_and_an_option_is_above_the_environment() -> None:
    plain = "  ready [bold]\nerror: wrong\n  do this\n"
    assert said(None).stderr == plain
    assert said("pretty", LLMASOS_LOG_FORMAT="json").stderr == plain


def test_a_format_that_is_none_is_refused_by_name() -> None:
    done = said(None, LLMASOS_LOG_FORMAT="xml")
    assert done.returncode == 2
    assert "LLMASOS_LOG_FORMAT is 'xml'" in done.stderr
    assert "Traceback" not in done.stderr
