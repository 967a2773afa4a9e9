"""What `llmasos gateway`, `up` and `key` take and print, where that needs no swarm."""

from pathlib import Path

import pytest

from llmasos.cli import build_parser
from llmasos.client.gateway_keys import load_keys, new_key
from llmasos.errors import UsageError
from tests.commands import Finished, llmasos_here


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://mine.example", "https://mine.example"),
        ("https://mine.example/", "https://mine.example"),
        ("HTTPS://Mine.Example:443", "https://mine.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80/", "http://[::1]"),
        ("moz-extension://2c127fa4-62c7", "moz-extension://2c127fa4-62c7"),
        ("*", "*"),
    ],
)
def test_an_origin_is_kept_as_browsers_send_it(given: str, origin: str) -> None:
    assert build_parser().parse_args(["up", "--cors-origin", given]).cors_origin == [origin]


@pytest.mark.parametrize("given", ["foo", "mine.example", "https://", "https://mine.example/app", "//x", "https://a b"])
def test_what_no_page_has_as_its_origin_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["up", "--cors-origin", given])
    assert "is no origin" in capsys.readouterr().err


async def key(name: str, file: Path) -> Finished:
    return await llmasos_here("key", name, "--file", str(file))


async def test_a_name_is_given_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    first = await key("alice", file)
    assert first.code == 0
    assert "when it starts" in first.stderr
    written = file.read_text()
    again = await key("alice", file)
    assert (again.code, again.stdout) == (2, "")
    assert "already has a key named alice" in again.stderr
    assert file.read_text() == written
    assert (await key("bob", file)).code == 0
    assert load_keys(file).find(first.stdout.strip()) is not None


@pytest.mark.parametrize("text", ["[[key", 'colour = "red"\n', "key = 3\n", '[[key]]\nname = "a"\n', "\xff"])
async def test_a_damaged_key_file_stays_as_it_is_and_the_hint_leads_out(text: str, tmp_path: Path) -> None:
    file = tmp_path / "my keys.toml"
    file.write_text(text, encoding="latin-1")
    refused = await key("alice", file)
    assert (refused.code, refused.stdout) == (2, "")
    assert f"mv '{file}' '{file}.old' && llmasos key alice" in refused.stderr
    assert file.read_text(encoding="latin-1") == text
    file.rename(f"{file}.old")
    assert (await key("alice", file)).code == 0


def test_without_a_key_file_one_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load_keys(tmp_path / "keys.toml")
    assert caught.value.hint == f"make one: llmasos key alice --file {tmp_path}/keys.toml"
    with pytest.raises(UsageError, match="Is a directory") as caught:
        load_keys(tmp_path)
    assert caught.value.hint == ""


@pytest.mark.parametrize("line", ['models = "smollm2"', "scopes = 3", "models = [4]"])
def test_what_should_be_a_list_is_no_list_of_letters(line: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f"{new_key('alice')[1]}{line}\n")
    with pytest.raises(UsageError, match=f"{line.split()[0]} is .*, not a list"):
        load_keys(file)
