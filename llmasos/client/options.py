"""The options that say which peers a client uses and how, and the config that they come to."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from shlex import quote

from llmasos.config import ClientConfig

FLAGS = {"dtype": "--dtype", "quantization": "--quantization", "codec": "--codec", "draft_model": "--draft"}
"""The options below, by the field of `ClientConfig` that each sets. One that was not given is None."""


def add_numbers(command: ArgumentParser) -> None:
    """The options of every command that computes with the swarm: which peers are meant."""
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help=f"use peers that compute in these numbers (default: {ClientConfig().dtype})",
    )
    command.add_argument(
        "--quantization",
        choices=["none", "int8", "int4"],
        help=f"use peers with such weights (default: {ClientConfig().quantization})",
    )


def add_codec(command: ArgumentParser) -> None:
    """The option of every command that sends rows to peers."""
    command.add_argument(
        "--codec",
        choices=["exact", "bfloat16", "int8"],
        help=f"pack rows for slow links; all but exact changes the numbers a little (default: {ClientConfig().codec})",
    )


def add_draft(command: ArgumentParser) -> None:
    """The option of those who write long texts."""
    command.add_argument(
        "--draft",
        dest="draft_model",
        metavar="MODEL",
        help="guess tokens with this smaller model, here; changes no text",
    )


def client_config(args: Namespace) -> ClientConfig:
    """What these options say; where one is not given, or a command does not have it, it is as `ClientConfig` has it."""
    return ClientConfig(**{name: getattr(args, name) for name in FLAGS if getattr(args, name, None) is not None})


def is_gateway(join: Sequence[str]) -> bool:
    """Whether the addresses of `--join` are not those of peers."""
    return any(address.startswith(("http://", "https://")) for address in join)


def with_address(hint: str, join: Sequence[str]) -> str:
    """The hint of an error with the address that was typed in the place of MULTIADDR, to be pasted as it is."""
    unnamed = "--join MULTIADDR"
    if not join or is_gateway(join) or not hint.endswith(unnamed):
        return hint
    return f"{hint.removesuffix(unnamed)}--join {quote(join[0])}"
