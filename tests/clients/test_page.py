"""The page in a real browser: it renders, streams, shows a killed peer, and runs nothing that a peer wrote."""

import json
import re
import shlex
import shutil
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.clients.conftest import HOSTILE, Guarded, Running

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


async def test_it_says_first_whether_the_swarm_is_usable(page: Any, running: Running) -> None:
    from playwright.async_api import expect

    await running.heal()
    await expect(page.locator("#headline")).to_have_text("smollm2 is usable", timeout=30_000)
    await expect(page.locator("#peers tbody tr")).to_have_count(3, timeout=30_000)  # one may have been killed just now
    assert await page.locator("#map .bar").count() == 3
    assert await page.locator("#map .cover span").count() == 30
    assert "2 peers" in await page.inner_text("#weakest")


async def test_what_a_peer_calls_itself_is_text(page: Any) -> None:
    await page.wait_for_timeout(500)
    assert await page.title() == "LLMasOS"
    assert await page.locator("#peers img").count() == 0
    assert "onerror" in await page.inner_text("#peers")


async def shows(page: Any, swarm: Any, activity: Any) -> None:
    """Have the page look at another swarm."""
    await page.route("**/api/swarm", lambda route: route.fulfill(json=swarm))
    await page.route("**/api/activity", lambda route: route.fulfill(json=activity))
    await page.wait_for_selector("#verdict.bad")


HOSTS = ("0:12", "20:30", "0:12")


def a_swarm(words: str) -> dict[str, Any]:
    """With a gap. Whatever is a text to the peers is `words`."""
    texts = dict.fromkeys(("name", "state", "dtype", "quantization", "version"), words)
    numbers = {"throughput": 12.5, "load": 0.25, "kv_free_tokens": 4096, "age_s": 3.0}
    peers = [{"peer": f"{words}{index}", "blocks": blocks, **texts, **numbers} for index, blocks in enumerate(HOSTS)]
    return {"models": [{"model": words, "blocks": 30, "covered": False, "missing": ["12:20"], "peers": peers}]}


def some_activity(words: str) -> dict[str, Any]:
    now = time.time()
    hop = {"peer": f"{words}0", "blocks": "0:12"}
    took = {"queue_ms": 1.25, "compute_ms": 20.0, "network_ms": 2.0}
    text = {"request": words, "choice": 0, "model": words, "waiting": words, "failovers": 1, "running_s": 2.0}
    numbers = {"prompt_tokens": 7, "tokens": 31, "tokens_per_s": 12.0}
    return {
        "now": now,
        "swarm_age_s": 0.5,
        "running": [{**text, **numbers, "route": [hop], "hops": [{**hop, **took}]}],
        "waiting": 3,
        "failovers": [{"at": now - 60, "model": words, "lost": [hop], "now": [hop], "why": words}],
        "samples": [{"at": now - 5, "tokens_per_s": 12.0, "time_to_first_token_s": 0.4}],
        "rtt_s": {f"{words}0": 0.012},
        "relayed": [f"{words}1"],
        "join": [words],
    }


@pytest.mark.parametrize(
    "words", [HOSTILE, "</td><script>document.title='HACKED'</script>", "'\"><svg onload=alert(1)>"]
)
async def test_no_text_of_a_peer_becomes_markup(words: str, page: Any) -> None:
    """Wherever one is shown: names, models, states, causes, errors of its own making."""
    await page.evaluate("void (window.alert = () => { document.title = 'HACKED' })")
    shapes = await page.evaluate("document.querySelectorAll('img, script, svg').length")
    await shows(page, a_swarm(words), some_activity(words))
    await page.wait_for_timeout(300)
    assert await page.title() == "LLMasOS"
    assert await page.evaluate("document.querySelectorAll('img, script, svg').length") == shapes
    for place in ("#headline", "#peers", "#running", "#failovers", "#fix"):
        assert words in await page.inner_text(place)


async def test_it_names_what_is_missing_and_who_was_lost(page: Any) -> None:
    swarm = a_swarm("it")
    for peer in swarm["models"][0]["peers"]:
        peer["state"] = "online"
    await shows(page, swarm, some_activity("it"))
    assert await page.inner_text("#headline") == "it waits: blocks 12:20 have no peer"
    assert "python -m llmasos.peer --blocks 12:20 --model it --join it" in await page.inner_text("#fix")
    assert await page.locator("#map .cover .none").count() == 8
    running, failovers = await page.inner_text("#running"), await page.inner_text("#failovers")
    assert "31 tokens" in running
    assert "23 ms" in running
    assert "60 s ago" in failovers or "61 s ago" in failovers
    assert "it lost 0:12 on it" in failovers
    cells = await page.locator("#peers tbody tr").all_inner_texts()
    assert ["relayed" in row for row in cells] == [False, True, False]
    assert "12 ms" in cells[0]


async def test_it_streams_an_answer(page: Any) -> None:
    await page.fill("#question", "What is the capital of France?")
    await page.press("#question", "Enter")
    await page.wait_for_selector(".talk .said", timeout=60_000)
    assert len(await page.inner_text(".talk .it")) > 10
    assert "tokens/s" in await page.inner_text(".talk .said")
    await page.evaluate("document.querySelector('.talk .it').textContent = 'line\\n'.repeat(99)")
    assert await page.evaluate("document.querySelector('.talk .it').scrollHeight") <= await page.evaluate(
        "document.querySelector('.talk .it').clientHeight"
    )  # the talk scrolls, no bubble bursts


async def test_it_fits_a_phone(page: Any) -> None:
    await page.set_viewport_size({"width": 360, "height": 740})
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    long = 12 * "words-without-end"
    await shows(page, a_swarm(long), some_activity(long))
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cells = "[...document.querySelectorAll('#peers td:not(.name)')]"
    assert await page.evaluate(f"{cells}.filter((cell) => cell.scrollWidth > cell.clientWidth).length") == 0


async def test_no_name_of_a_model_is_a_command(page: Any) -> None:
    """What is offered for pasting into a shell says the name, whatever it is."""
    name = 'it\'s $(reboot); `reboot` "x" #'
    await shows(page, a_swarm(name), some_activity("it"))
    words = shlex.split(await page.inner_text("#fix code"))
    assert words[words.index("--model") + 1 :] == [name, "--join", "it"]
    await page.click("[data-snippet=curl]")
    words = shlex.split(await page.inner_text("#snippet"))
    assert words[-2] == "-d"
    assert json.loads(words[-1])["model"] == name


async def test_snippets_carry_the_address(page: Any, running: Running) -> None:
    for name in ("curl", "openai", "langchain", "llmasos"):
        await page.click(f"[data-snippet={name}]")
        assert running.url in await page.inner_text("#snippet")


async def test_a_key_is_asked_for_and_never_shown(browser: Any, guarded: Guarded) -> None:
    from playwright.async_api import expect

    context = await browser.new_context()
    page = await context.new_page()
    await page.goto(guarded.url)
    await page.fill("#key", "sk-llmasos-wrong")
    await page.press("#key", "Enter")
    await expect(page.locator("#age")).to_contain_text("not known")
    await page.fill("#key", guarded.secret)
    await page.press("#key", "Enter")
    await expect(page.locator("#peers tbody tr").first).to_be_visible(timeout=30_000)
    await expect(page.locator("#login")).to_be_hidden()
    assert "YOUR_KEY" in await page.inner_text("#snippet")
    assert guarded.secret not in await page.content()
    await context.close()


async def test_a_peer_killed_under_an_answer(page: Any, running: Running) -> None:
    """The answer goes on; the peer is gone from the page within 30 seconds, and the page says what happened."""
    from playwright.async_api import expect

    await running.heal()
    await expect(page.locator("#peers tbody tr")).to_have_count(3, timeout=30_000)
    await page.fill("#question", "Tell me a long story about a fox.")
    await page.press("#question", "Enter")
    await expect(page.locator(".talk .it")).to_contain_text(re.compile(r".{40}"), timeout=60_000)
    killed = await running.kill_one_in_use()
    await expect(page.locator("#peers tbody tr")).to_have_count(2, timeout=30_000)
    names = await page.locator("#peers tbody tr td:nth-child(2)").all_inner_texts()
    assert killed not in names
    assert len(names) == 2
    await page.wait_for_selector(".talk .said", timeout=120_000)
    assert await page.locator(".talk .wrong").count() == 0
    await expect(page.locator("#failovers li").first).to_contain_text("smollm2 lost 0:", timeout=10_000)
    await expect(page.locator("#headline")).to_have_text("smollm2 is usable", timeout=30_000)
