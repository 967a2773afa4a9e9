"""`llmasos generate`, `status` and `models` in front of a gateway: what they show, send and refuse."""

from tests.commands import llmasos_here


async def test_a_gateway_that_is_not_there_in_plain_words() -> None:
    done = await llmasos_here("status", "--join", "http://127.0.0.1:1")
    first, hint = done.stderr.splitlines()
    assert (done.code, done.stdout) == (1, "")
    assert first == "the gateway http://127.0.0.1:1 does not answer: Connection refused"
    assert "is it running?" in hint
