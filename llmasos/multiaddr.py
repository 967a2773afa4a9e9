"""The one written form of "where a peer is": `/ip4/203.0.113.5/tcp/4001/p2p/12D3Koo…`, printed and pasted by people."""

import ipaddress
import re

from llmasos.errors import UsageError
from llmasos.identity import public_key_of
from llmasos.network import PeerId
from llmasos.wire import Contact

EXAMPLE = "/ip4/203.0.113.5/tcp/4001/p2p/12D3KooWPk51brrtu3iCxm9Q5MUSArhMDM6ZsuF3ifu92U5HNJna"

_FORM = re.compile(r"(?P<transport>/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/\s]{1,200})/tcp/(?P<port>\d{1,5}))")


def parse_multiaddr(text: str) -> Contact:
    """The peer id and the address in a multiaddr. Raises UsageError that says what is wrong with it."""
    transport, marker, peer = text.strip().partition("/p2p/")
    if not marker:
        raise _wrong(text, "it does not end in /p2p/ and a peer id")
    try:
        public_key_of(peer)
    except ValueError as error:
        raise _wrong(text, f"after /p2p/ there must be a peer id that begins with 12D3Koo ({error})") from error
    if not is_transport(transport):
        raise _wrong(text, "it must begin with /ip4/HOST/tcp/PORT (or ip6, or dns)")
    return Contact(peer=PeerId(peer), addresses=(transport,))


def is_transport(text: str) -> bool:
    """Whether this is an address that LLMasOS dials: a host and a TCP port, nothing behind them."""
    match = _FORM.fullmatch(text)
    if not match or not 0 < int(match["port"]) < 65_536:
        return False
    if match["kind"].startswith("dns"):
        return True
    try:
        return ipaddress.ip_address(match["host"]).version == (4 if match["kind"] == "ip4" else 6)
    except ValueError:
        return False


def _wrong(text: str, reason: str) -> UsageError:
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    return UsageError(f"{shown!r} is not the multiaddr of a peer: {reason}", hint=f"one looks like this: {EXAMPLE}")
