"""Documents do not rot: links resolve, generated pages are fresh, snippets compile, nothing is left half done."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFTOVERS = ["TO" + "DO", "FIX" + "ME", "XX" + "X"]  # in two parts, or this file would be one
FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@cache
def tracked() -> list[Path]:
    """Every text file of the project that is, or is about to be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        hidden = (".venv", ".git", "build", "dist")
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        listed = [str(path) for path in found if path.parts[0] not in hidden and "__pycache__" not in path.parts]
    return [path for name in sorted(listed) if (path := ROOT / name).is_file()]


def pages() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(page: Path) -> Iterator[str]:
    """The targets of the links of a page, outside of code."""
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        yield match["target"]


def headings(page: Path) -> set[str]:
    """The anchors that the headings of a page make."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> Iterator[str]:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue  # somebody else's page
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            yield f"{name_of(page)}: {target} is not there"
        elif anchor and anchor not in headings(there):
            yield f"{name_of(page)}: {target} has no such heading"


def test_every_link_resolves() -> None:
    assert [problem for page in pages() for problem in broken(page)] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / target).resolve() for target in links(page) if not re.match(r"[a-z]+:|#", target)]
    assert [name_of(page) for page in pages() if page not in reached] == []


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_stale_pages_are_named_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    pages_now = {name: make() for name, make in generate.PAGES.items()}
    for name, text in pages_now.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(generate, "HERE", tmp_path)
    assert generate.stale() == {}
    (tmp_path / "cli.md").write_text(pages_now["cli.md"].replace("--join MULTIADDR", "--joined MULTIADDR"))
    (tmp_path / "api.md").unlink()
    stale = generate.stale()
    assert sorted(stale) == ["api.md", "cli.md"]
    assert "--joined MULTIADDR" in stale["cli.md"]


def python_snippets() -> list[tuple[str, str]]:
    found = []
    for page in pages():
        if page.name == "api.md":
            continue  # signatures, not programs
        for number, match in enumerate(FENCE.finditer(page.read_text(encoding="utf-8"))):
            if match["kind"] == "python":
                found.append((f"{name_of(page)} {number}", match["body"]))
    return found


@pytest.mark.parametrize(
    "snippet", [body for _, body in python_snippets()], ids=[name for name, _ in python_snippets()]
)
def test_snippets_compile(snippet: str) -> None:
    compile(snippet, "snippet", "exec")


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TESTS_OF_EXAMPLES = sorted((ROOT / "tests").rglob("test_*examples.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_say_how_to_run_them_and_are_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"python examples/{path.name}" in text
    assert any(f"examples/{path.name}" in test.read_text(encoding="utf-8") for test in TESTS_OF_EXAMPLES)


def test_the_readme_has_the_snippet_that_users_paste() -> None:
    assert any(name.startswith("README.md") and "generate_text(" in body for name, body in python_snippets())


def test_commands_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\bmake ([a-z-]+)\b", (ROOT / page).read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} says make {target}"


def test_nothing_is_left_half_done() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".yml", "") and path.stat().st_size < 2**20
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if any(re.search(rf"\b{word}\b", line) for word in LEFTOVERS)
    ]
    assert found == []
