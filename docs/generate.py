"""Writes the generated pages of docs/, or with --check says which of them are stale.

    python docs/generate.py            write docs/cli.md, docs/config.md and docs/api.md
    python docs/generate.py --check    exit 1, with a diff, when one of them is not what it would write

`cli.md` comes from the argument parsers, the other two from the syntax tree of the source: torch is not imported.
"""

import ast
import difflib
import os
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

COLUMNS = "100"
"""argparse folds its help at the width of the terminal; here it always has the same."""


# --- cli.md ---------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """The `--help` of every command."""
    os.environ["COLUMNS"] = COLUMNS
    from bootstrap.__main__ import build_parser as bootstrap_parser
    from llmasos.cli import build_parser as llmasos_parser
    from llmasos.peer.__main__ import build_parser as peer_parser
    from sim.__main__ import build_parser as sim_parser

    parts = [
        "# Commands",
        "stdout carries data, stderr carries talk. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n"
        "With `NO_COLOR` set nothing is coloured. Errors are one message and the next command to type; `--debug` adds "
        "the traceback.",
    ]
    for top in (peer_parser(), llmasos_parser(), bootstrap_parser(), sim_parser()):
        for parser in _with_subcommands(top):
            parts += [f"## {parser.prog}", f"```text\n{parser.format_help().rstrip()}\n```"]
    return _page(parts)


def _with_subcommands(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for command in action.choices.values():
                yield from _with_subcommands(command)


# --- config.md ------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """The constants and the settings of llmasos/config.py."""
    module = _parse("llmasos/config.py")
    constants: list[list[str]] = []
    parts = [
        "# Configuration",
        _docstring(module),
        "Settings are frozen dataclasses, one a role: build one, or use `dataclasses.replace`. Those that a command "
        "exposes as flags are in [Commands](cli.md). Constants are not settings: changing one changes what peers "
        "expect of each other.",
    ]
    for node, explanation in _documented(module.body):
        if isinstance(node, ast.ClassDef):
            rows = [
                [f"`{field.target.id}`", _code(field.annotation), _default(field.value), text]
                for field, text in _documented(node.body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            ]
            parts += [f"## {node.name}", _docstring(node), _table(["field", "type", "default", ""], rows)]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            constants.append([f"`{node.targets[0].id}`", _code(node.value), explanation])
    parts += ["## Constants", _table(["constant", "value", ""], constants)]
    return _page(parts)


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        [factory] = [keyword.value for keyword in value.keywords if keyword.arg == "default_factory"]
        return f"`{ast.unparse(factory)}()`"
    return _code(value)


# --- api.md ---------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """What `llmasos.__all__` names: signatures and docstrings."""
    package = _parse("llmasos/__init__.py")
    homes = {
        alias.name: node.module
        for node in ast.walk(package)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmasos.")
        for alias in node.names
    }
    classes = {name: (homes[name], _class(homes[name], name)) for name in _public_names(package) if name in homes}
    errors = [node for home, node in classes.values() if home == "llmasos.errors"]
    parts = [
        "# Python interface",
        "What `llmasos.__all__` names, and nothing else, is public: it changes only with an entry in the changelog. "
        "`import llmasos` costs milliseconds; torch is loaded with the first client.",
    ]
    for name, (home, node) in classes.items():
        if home != "llmasos.errors":
            parts += list(_class_section(home, node))
            for helper_home, helper in HELPERS.get(name, []):
                parts += list(_class_section(helper_home, _class(helper_home, helper)))
    parts += ["## Errors", "```text\n" + _tree(_docstring(_parse("llmasos/errors.py"))) + "\n```"]
    parts.append(
        "Every error has `message`, `hint` (the next command to type, or nothing), `http_status` and `retryable`."
    )
    parts.append(_table(["error", ""], [[f"`{node.name}`", _one_line(_docstring(node))] for node in errors]))
    return _page(parts)


HELPERS = {
    "AsyncLLMasOS": [("llmasos.client.async_client", "Options")],
    "Generation": [
        ("llmasos.client.generation", "RoutedHop"),
        *(("llmasos.client.trace", name) for name in ("Trace", "HopTime", "StepTime")),
    ],
}
"""Types that a public name cannot be understood without, and where they are; they stand behind it."""


def _class(home: str, name: str) -> ast.ClassDef:
    module = _parse(f"{home.replace('.', '/')}.py")
    [found] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def _public_names(package: ast.Module) -> list[str]:
    [names] = [
        node.value
        for node in package.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    ]
    found: list[str] = ast.literal_eval(names)
    return found


def _class_section(home: str, node: ast.ClassDef) -> Iterator[str]:
    constants = _Constants(home)
    yield f"## {node.name}"
    yield _docstring(node)
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)]
    if fields:
        rows = [[f"`{ast.unparse(field.target)}`", _code(field.annotation)] for field in fields]
        yield _table(["field", "type"], rows)
    same: list[str] = []
    for method in node.body:
        if isinstance(method, ast.Assign) and ast.unparse(method.value).startswith("_blocking("):
            same.append(_code(method.targets[0]))
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        method = constants.visit(method)
        if method.name == "__init__":
            yield f"```python\n{_signature(node.name, method)}\n```"
        elif _docstring(method).startswith("See `"):
            same.append(f"`{method.name}`")
        elif not method.name.startswith("_"):
            yield f"### {node.name}.{method.name}"
            yield f"```python\n{_signature(method.name, method)}\n```"
            yield _docstring(method)
    if same:
        yield f"The same, not awaited: {', '.join(same)}."


class _Constants(ast.NodeTransformer):
    """Puts the values of a module's constants where their names stand: a reader of the page cannot look them up."""

    def __init__(self, home: str) -> None:
        self.values = {
            node.targets[0].id: node.value
            for node in _parse(f"{home.replace('.', '/')}.py").body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)


def _signature(name: str, method: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """One line if it fits, else one argument a line; without `self`."""
    arguments = method.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_argument(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if shown and positional[0].arg in ("self", "cls"):
        shown = shown[1:]
    if arguments.vararg is not None:
        shown.append("*" + ast.unparse(arguments.vararg))
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [_argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg is not None:
        shown.append("**" + ast.unparse(arguments.kwarg))
    begin = "async " if isinstance(method, ast.AsyncFunctionDef) else ""
    end = f" -> {ast.unparse(method.returns)}" if method.returns is not None and method.name != "__init__" else ""
    line = f"{begin}{name}({', '.join(shown)}){end}"
    if len(line) <= int(COLUMNS):
        return line
    return f"{begin}{name}(\n" + "".join(f"    {argument},\n" for argument in shown) + f"){end}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation is not None else f"{text}={ast.unparse(default)}"


def _tree(docstring: str) -> str:
    """The drawing in the docstring of the errors."""
    lines = docstring.splitlines()
    drawn = [line for line in lines if line.startswith("    ")]
    return "\n".join(line.removeprefix("    ") for line in drawn)


# --- shared ---------------------------------------------------------------------------------------------------------


def _parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return ast.get_docstring(node) or ""


def _documented(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Each statement, and the text that stands right behind it."""
    for node, following in zip(body, [*body[1:], None], strict=True):
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = _one_line(str(following.value.value))
        yield node, text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code(node: ast.expr) -> str:
    return f"`{ast.unparse(node)}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _page(parts: list[str]) -> str:
    note = "<!-- Written by docs/generate.py; do not edit. `make docs` writes it anew. -->"
    return "\n\n".join([note, *(part for part in parts if part)]) + "\n"


PAGES = {"cli.md": cli_page, "config.md": config_page, "api.md": api_page}


def stale() -> dict[str, str]:
    """By page: the difference between what is there and what should be."""
    found = {}
    for name, make in PAGES.items():
        path = HERE / name
        old, new = path.read_text(encoding="utf-8") if path.exists() else "", make()
        if old != new:
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"docs/{name} as it is", f"docs/{name} as it should be", lineterm=""
            )
            found[name] = "\n".join(lines)
    return found


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments == ["--check"]:
        differences = stale()
        for name, difference in differences.items():
            sys.stderr.write(f"{difference}\n\ndocs/{name} is stale: write it anew with: make docs\n")
        return 1 if differences else 0
    if arguments:
        sys.stderr.write(f"{__doc__}")
        return 2
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
