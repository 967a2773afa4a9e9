"""python -m sim.peer LINKS …: the shipped peer, with the latency and the bandwidth of `sim.links` injected.

LINKS is `sim.links.Links` as JSON; what follows is for `python -m llmasos.peer`. Started by `sim.local`.
"""

import sys

from llmasos.console import say
from llmasos.errors import UsageError
from llmasos.peer.__main__ import main as start_peer
from sim.links import LinkedNetwork, Links


def main() -> None:
    """The command line."""
    try:
        links = Links.from_json(sys.argv[1] if len(sys.argv) > 1 else "")
    except UsageError as error:
        say(f"error: {error.message}", style="bold red")
        raise SystemExit(2) from None
    start_peer(sys.argv[2:], wrap=lambda network: LinkedNetwork(network, links))


if __name__ == "__main__":
    main()
