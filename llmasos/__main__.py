"""`python -m llmasos` is `llmasos`."""


def main() -> None:
    """The same, ended quietly by a Ctrl-C that comes before the command itself can hear it."""
    try:
        from llmasos.cli import main as command

        command()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
