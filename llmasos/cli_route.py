"""llmasos route: the route that a request would take now, and why."""

import asyncio
import json
import random
import secrets
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.client.options import add_numbers, client_config
from llmasos.config import PONG_TIMEOUT_S, NetworkConfig
from llmasos.console import say, show, tell, whole
from llmasos.errors import MissingBlocksError, ModelError, PeerError
from llmasos.network import Network
from llmasos.wire import PROTOCOL, Contact, Ping, encode

if TYPE_CHECKING:
    from llmasos.routing.health import Health
    from llmasos.routing.records import PeerRecord

MAX_PINGED = 64
"""Peers whose distance is measured before a route is planned; the others count as far away as these are typically."""
COSTS = ("link_s", "compute_s", "wait_s", "own_s", "risk_s", "doubt_s")


async def route(args: Namespace) -> None:
    """Plan as a client that has just come would, and tell: hops on stdout, what they cost on stderr."""
    say("joining the swarm", style="dim")
    config = client_config(args)
    new_tokens = await asyncio.to_thread(_new_tokens, args)
    from llmasos.p2p import P2PNetwork
    from llmasos.routing.directory import Directory
    from llmasos.routing.explain import as_json, explain
    from llmasos.routing.health import Health
    from llmasos.routing.planner import RouteRequest

    async with await P2PNetwork.create(NetworkConfig(listen=False)) as network:
        await network.join(args.join)
        directory, health = Directory(network), Health()
        await directory.refresh(args.model)
        view = directory.view
        checkpoint = view.checkpoint(args.model)
        if checkpoint is None:
            error = MissingBlocksError(args.model, ["auto"])
            raise error.wanting(config.dtype, config.quantization)
        await _measure(network, view.peers(args.model)[:MAX_PINGED], health)
        request = RouteRequest(
            model=args.model,
            digest=checkpoint.digest,
            model_blocks=checkpoint.blocks,
            prompt_tokens=args.prompt_tokens,
            new_tokens=new_tokens,
            kv_tokens=args.prompt_tokens + new_tokens,
            dtype=config.dtype,
            quantization=config.quantization,
        )
        try:
            explanation = explain(view, request, network.now(), random.Random(secrets.randbits(64)), health)
        except MissingBlocksError as error:
            raise error.wanting(config.dtype, config.quantization) from None
        found = as_json(view, args.model, explanation)
    if args.json:
        show(json.dumps(found, ensure_ascii=False))
        return
    for hop in found["route"]["hops"]:
        show(f"{hop['blocks']}\t{hop['peer']}")
    if args.explain:
        _explain(found, args.prompt_tokens, new_tokens)


def _new_tokens(args: Namespace) -> int:
    """How many of them a text may have, as `generate` has it. Raises UsageError when the prompt alone is too long.

    A model whose files are not on this machine says nothing of its context: they are not fetched for that.
    """
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.blocks.registry import ALIASES, embedded, resolve
    from llmasos.client.generation import GenerationRequest

    wanted: int = args.new_tokens
    alias = ALIASES.get(args.model)
    if not (Path(args.model).exists() if alias is None else embedded(alias)):
        return wanted
    try:
        context_tokens = resolve(args.model).context_tokens
    except ModelError:
        return wanted  # what peers announce has the name of something else here
    request = GenerationRequest("", max_new_tokens=max(wanted, 1))
    return min(wanted, request.new_tokens(args.prompt_tokens, context_tokens))


async def round_trip_s(network: Network, record: "PeerRecord") -> float | None:
    """To a peer and back, once there is a connection; None when it does not answer."""
    try:
        async with asyncio.timeout(PONG_TIMEOUT_S):
            stream = await network.connect(Contact(record.peer, record.addresses), PROTOCOL)
            try:
                for _ in range(2):  # the first answers to the opening of the stream as well
                    begin = network.now()
                    await stream.send(encode(Ping()))
                    await stream.receive()
            finally:
                await stream.close()
    except (PeerError, TimeoutError):
        return None
    return max(network.now() - begin, 0.0)


async def _measure(network: Network, peers: list["PeerRecord"], health: "Health") -> None:
    """Ping them all at once; who does not answer is a failure that the planner reckons with."""

    async def ping(record: "PeerRecord") -> None:
        rtt_s = await round_trip_s(network, record)
        if rtt_s is None:
            health.failed(record.peer, network.now())
        else:
            health.saw_rtt(record.peer, rtt_s, network.now())

    await asyncio.gather(*(ping(record) for record in peers))


def _explain(found: dict[str, Any], prompt_tokens: int, new_tokens: int) -> None:
    say(f"\nwhat {prompt_tokens} prompt tokens and {new_tokens} new ones cost, in seconds:", style="bold")
    _show_costs(found["route"])
    for other in found["runners_up"]:
        share = other["total_s"] / max(found["route"]["total_s"], 1e-9) - 1
        say(f"\nwithout {other['without'][-8:]} ({share:+.0%}):", style="bold")
        _show_costs(other)
    if found["runners_up"]:
        say("\nroutes within a quarter of the cheapest are equal: each plan draws among them", style="dim")
    else:
        say("\nno other route: each of these peers holds blocks that nobody else has")


def _show_costs(route: dict[str, Any]) -> None:
    head = ("blocks", "peer", "name", *(cost.removesuffix("_s") for cost in COSTS), "total")
    rows = [
        [hop["blocks"], hop["peer"][-8:], hop["name"], *(f"{hop[cost]:.3f}" for cost in (*COSTS, "total_s"))]
        for hop in route["hops"]
    ]
    tell(head, [*rows, [""] * (len(head) - 1) + [f"{route['total_s']:.3f}"]], left=("blocks", "peer"))


def add_route(command: ArgumentParser) -> None:
    """What it takes."""
    command.add_argument("--model", default="smollm2", help="as peers announce it (default: %(default)s)")
    command.add_argument("--prompt-tokens", type=whole(1), default=64, help="(default: %(default)s)")
    command.add_argument("--new-tokens", type=whole(0), default=64, help="(default: %(default)s)")
    add_numbers(command)
    command.add_argument("--explain", action="store_true", help="what each hop costs and why, and the runners-up")
    command.add_argument("--join", action="append", required=True, metavar="MULTIADDR", help="a peer of the swarm")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
