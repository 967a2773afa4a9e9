"""The page in a real browser: it renders, streams, shows a killed peer, and runs nothing that a peer wrote."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.clients.conftest import Running, heal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        await started.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Any, running: Running) -> AsyncIterator[Any]:
    """The page, open; a test fails with anything that the browser complains about."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    opened = await context.new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: foreign.append(request.url) if running.url not in request.url else None)
    await opened.goto(running.url)
    await opened.wait_for_selector("#peers tbody tr")
    yield opened
    assert complaints == []
    assert foreign == []
    await context.close()


async def test_it_says_first_whether_the_swarm_is_usable(page: Any) -> None:
    from playwright.async_api import expect

    await expect(page.locator("#headline")).to_have_text("smollm2 is usable", timeout=30_000)
    await expect(page.locator("#peers tbody tr")).to_have_count(4, timeout=30_000)  # one may have been killed just now
    assert await page.locator("#map .bar").count() == 4
    assert await page.locator("#map .cover span").count() == 30
    assert "2 peers" in await page.inner_text("#weakest")


async def test_what_a_peer_calls_itself_is_text(page: Any) -> None:
    await page.wait_for_timeout(500)
    assert await page.title() == "LLMasOS"
    assert await page.locator("#peers img").count() == 0
    assert "onerror" in await page.inner_text("#peers")


async def test_it_streams_an_answer(page: Any) -> None:
    await page.fill("#question", "What is the capital of France?")
    await page.press("#question", "Enter")
    await page.wait_for_selector(".talk .said", timeout=60_000)
    assert len(await page.inner_text(".talk .it")) > 10
    assert "tokens/s" in await page.inner_text(".talk .said")


async def test_it_fits_a_phone(page: Any) -> None:
    await page.set_viewport_size({"width": 360, "height": 740})
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_snippets_carry_the_address(page: Any, running: Running) -> None:
    for name in ("curl", "openai", "langchain", "llmasos"):
        await page.click(f"[data-snippet={name}]")
        assert running.url in await page.inner_text("#snippet")


async def test_killed_peers_show_within_30_seconds(page: Any, running: Running) -> None:
    from playwright.async_api import expect

    await asyncio.gather(running.swarm.kill("a"), running.swarm.kill("c"))
    await expect(page.locator("#headline")).to_contain_text("blocks 0:15 have no peer", timeout=30_000)
    assert "--blocks 0:15 --model smollm2" in await page.inner_text("#fix")
    await heal(running.swarm)
    await expect(page.locator("#headline")).to_have_text("smollm2 is usable", timeout=30_000)
