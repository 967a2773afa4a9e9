"""Imports point one way, heavy libraries stay where they belong, and what the simulator runs touches no clock.

Read with `ast`, so that imports inside functions count as well. Nothing of the project is imported here.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llmasos", "bootstrap", "sim")

LAYERS = [
    ["llmasos.errors", "llmasos.config", "llmasos.span"],
    ["llmasos.*"],  # the wire, the network, and whatever is not named elsewhere
    ["llmasos.routing", "llmasos.blocks"],
    ["llmasos.peer", "llmasos.client"],
    ["llmasos.cli", "llmasos.cli_*", "llmasos.doctor", "llmasos.__main__", "bootstrap", "sim"],
]
"""A module imports from its own layer and from those before it. `llmasos` itself, the public API, is in the last."""

STRANGERS = [
    ("llmasos.client", "llmasos.peer"),
    ("llmasos.peer", "llmasos.client"),
    ("llmasos.routing", "llmasos.blocks"),
    ("llmasos.blocks", "llmasos.routing"),
    ("llmasos", "sim"),
    ("llmasos", "bootstrap"),
    ("bootstrap", "sim"),
]
"""(who, whom): never imports."""

TORCH_HOMES = [
    "llmasos.blocks",
    "llmasos.peer.torch_runner",
    "llmasos.client.generate",
    "llmasos.client.head",
    "llmasos.client.transformers_model",
]
HOMES = {
    "torch": TORCH_HOMES,
    "transformers": TORCH_HOMES,
    "hivemind": ["llmasos.p2p", "llmasos.p2p_*"],
    "aiohttp": ["llmasos.client.gateway*", "llmasos.client.http*"],
}
"""Where a heavy library may be loaded."""

SIMULATED = [
    "llmasos.peer",
    "llmasos.routing",
    *(
        f"llmasos.client.{name}"
        for name in ("session", "recruiter", "connections", "events", "flights", "hop", "hops", "router")
    ),
]
"""Runs unchanged under virtual time: clocks, sleeping and chance come in through a seam."""
REAL = ["llmasos.peer.torch_runner", "llmasos.peer.metrics", "llmasos.peer.serve", "llmasos.peer.__main__"]
"""The real side of the Runner seam, what a process shows, and where it begins."""
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "sleep"}
CHANCE = {"Random"}
"""The only name of `random` in use: a generator that somebody seeds and hands in."""

ROUTING_IS_FREE_OF = ["torch", "transformers", "hivemind", "aiohttp", "numpy", "msgspec"]


class Import(NamedTuple):
    """`who` imports `module` in line `line`."""

    who: str
    module: str
    line: int
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.who} (line {self.line}) imports {self.module}"


def is_in(module: str, homes: list[str]) -> bool:
    """Whether the module is one of `homes`, or inside one."""
    return any(fnmatch(module, home) or fnmatch(module, f"{home}.*") for home in homes)


def layer(module: str) -> int:
    if module == "llmasos":
        return len(LAYERS) - 1
    named = [number for number, homes in enumerate(LAYERS) if homes != ["llmasos.*"] and is_in(module, homes)]
    return named[0] if named else 1


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the project and its syntax tree."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").exists()


def imports_of(who: str) -> Iterator[Import]:
    for node, for_types_only in walk(sources()[who], False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(who, alias.name, node.lineno, for_types_only)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = who.split(".") if is_package(who) else who.split(".")[:-1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if base == "llmasos" and alias.name == "__version__":
                    continue  # a plain constant of the package
                yield Import(who, inner if inner in sources() else base, node.lineno, for_types_only)


def walk(node: ast.AST, for_types_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, and whether only type checkers see them."""
    for child in ast.iter_child_nodes(node):
        guarded = for_types_only
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body:
            guarded = True
        yield child, guarded
        yield from walk(child, guarded)


def all_imports() -> list[Import]:
    return [found for who in sources() for found in imports_of(who)]


def complain(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


def test_imports_point_one_way() -> None:
    complain(
        [
            f"{found}, which is of a later layer"
            for found in all_imports()
            if found.module in sources() and layer(found.module) > layer(found.who)
        ]
    )


@pytest.mark.parametrize(("who", "whom"), STRANGERS)
def test_some_never_meet(who: str, whom: str) -> None:
    complain([str(found) for found in all_imports() if is_in(found.who, [who]) and is_in(found.module, [whom])])


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_at_home(library: str) -> None:
    complain(
        [
            f"{found}; only {', '.join(HOMES[library])} may"
            for found in all_imports()
            if found.module.split(".")[0] == library
            and found.who.startswith("llmasos")
            and not found.for_types_only
            and not is_in(found.who, HOMES[library])
        ]
    )


def simulated() -> list[str]:
    return [module for module in sources() if is_in(module, SIMULATED) and not is_in(module, REAL)]


def test_what_is_simulated_asks_no_clock() -> None:
    complain(
        [
            f"{module} (line {node.lineno}) uses {text}"
            for module in simulated()
            for node, text in names_of(module, "time")
            if text in CLOCKS
        ]
        + [
            f"{module} (line {node.lineno}) asks datetime for the time"
            for module in simulated()
            for node in ast.walk(sources()[module])
            if isinstance(node, ast.Attribute)
            and node.attr in ("now", "utcnow", "today")
            and "datetime" in ast.dump(node)
        ]
    )


def test_what_is_simulated_takes_no_chances_of_its_own() -> None:
    complain(
        [
            f"{module} (line {node.lineno}) uses random.{text}"
            for module in simulated()
            for node, text in names_of(module, "random")
            if text not in CHANCE
        ]
        + [str(found) for module in simulated() for found in imports_of(module) if found.module in ("secrets", "uuid")]
    )


def names_of(module: str, library: str) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What a module takes from a library: `library.name` and `from library import name`, under any alias."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(sources()[module])
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == library
    }
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.ImportFrom) and node.module == library:
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield node, node.attr


def test_routing_loads_only_the_standard_library() -> None:
    modules = [name for name in sources() if is_in(name, ["llmasos.routing"])]
    script = f"import sys, json, {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "llmasos" in loaded
    assert loaded.isdisjoint(ROUTING_IS_FREE_OF)


def test_the_rules_catch_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    guilty = """
from typing import TYPE_CHECKING
import random as dice, time
from time import monotonic
if TYPE_CHECKING:
    import hivemind
def f():
    import torch
    from llmasos.client import session
    from ..peer import handler
    dice.choice([]), time.sleep(1), dice.Random(1)
"""
    trees = {"llmasos.routing.guilty": ast.parse(guilty), "llmasos.client.session": ast.parse("")}
    trees |= {"llmasos.peer.handler": ast.parse("")}
    monkeypatch.setattr(sys.modules[__name__], "sources", lambda: trees)
    seen = {(found.module, found.for_types_only) for found in all_imports()}
    assert seen >= {("torch", False), ("hivemind", True), ("llmasos.client.session", False)}
    assert ("llmasos.peer.handler", False) in seen
    with pytest.raises(AssertionError, match="later layer"):
        test_imports_point_one_way()
    with pytest.raises(AssertionError, match="imports torch"):
        test_heavy_libraries_stay_at_home("torch")
    test_heavy_libraries_stay_at_home("hivemind")
    with pytest.raises(AssertionError, match=r"uses monotonic(?s:.)*uses sleep|uses sleep(?s:.)*uses monotonic"):
        test_what_is_simulated_asks_no_clock()
    with pytest.raises(AssertionError, match=r"random\.choice"):
        test_what_is_simulated_takes_no_chances_of_its_own()
