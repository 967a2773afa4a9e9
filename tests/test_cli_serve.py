"""What `llmasos gateway`, `up` and `key` take and print, where that needs no swarm."""

import pytest

from llmasos.cli import build_parser


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
