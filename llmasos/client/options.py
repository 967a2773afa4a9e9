"""The options that say which peers a client uses and how, and the config that they come to."""

from argparse import ArgumentParser, Namespace

from llmasos.config import ClientConfig


def add_numbers(command: ArgumentParser) -> None:
    """The options of every command that computes with the swarm: which peers are meant."""
    command.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="use peers that compute in these numbers (default: %(default)s)",
    )
    command.add_argument(
        "--quantization",
        default="none",
        choices=["none", "int8", "int4"],
        help="use peers with such weights (default: %(default)s)",
    )


def add_codec(command: ArgumentParser) -> None:
    """The option of every command that sends rows to peers."""
    command.add_argument(
        "--codec",
        default="exact",
        choices=["exact", "bfloat16", "int8"],
        help="pack rows for slow links; less than exact changes the numbers a little (default: %(default)s)",
    )


def add_draft(command: ArgumentParser) -> None:
    """The option of those who write long texts."""
    command.add_argument(
        "--draft",
        dest="draft_model",
        default="",
        metavar="MODEL",
        help="guess tokens with this smaller model, here; changes no text",
    )


def client_config(args: Namespace) -> ClientConfig:
    """What these options say; where a command does not have one, it is as `ClientConfig` has it."""
    names = ("dtype", "quantization", "codec", "draft_model")
    return ClientConfig(**{name: getattr(args, name) for name in names if name in args})
