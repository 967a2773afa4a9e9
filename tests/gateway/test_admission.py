"""Who gets in, who waits, who is told to come back. In virtual time, without HTTP; then the keys over HTTP."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from llmasos.blocks.registry import ModelSpec
from llmasos.client.gateway_admission import Admission
from llmasos.client.gateway_keys import Key, KeyRing, hash_of, load_keys, new_key
from llmasos.client.openai_fields import ApiError
from llmasos.errors import UsageError
from sim.loop import run
from tests.gateway.conftest import Served, folder_of, serve

ALICE, BOB = Key("alice"), Key("bob")


class Door:
    """An admission and what it has refused."""

    def __init__(self, running: int = 2, waiting: int = 5, wait_s: float = 10.0) -> None:
        self.refused: Counter[str] = Counter()
        self.admission = Admission(running, waiting, wait_s, self._refuse)
        self.order: list[str] = []

    def _refuse(self, reason: str) -> None:
        self.refused[reason] += 1

    async def visit(self, key: Key, name: str, *, stay_s: float = 1.0, places: int = 1) -> None:
        async with self.admission.enter(key, places):
            self.order.append(name)
            await asyncio.sleep(stay_s)


def test_keys_take_turns() -> None:
    async def scene() -> None:
        door = Door(running=1, waiting=20)
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(door.visit(ALICE, f"alice{number}"))
            await asyncio.sleep(0)
            group.create_task(door.visit(BOB, "bob"))
        assert door.order.index("bob") <= 2
        assert (door.admission.running, door.admission.waiting) == (0, 0)

    run(scene())


def test_a_full_queue_refuses_at_once_and_a_long_wait_after_a_while() -> None:
    async def scene() -> None:
        door = Door(running=1, waiting=1, wait_s=10)
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(door.visit(ALICE, "first", stay_s=60))
        await asyncio.sleep(0)
        second = asyncio.create_task(door.visit(ALICE, "second"))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await door.visit(BOB, "third")  # nobody has more waiting than Bob would
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        assert loop.time() == pytest.approx(0, abs=0.01)
        with pytest.raises(ApiError, match="no place"):
            await second
        assert loop.time() == pytest.approx(10, abs=0.01)
        await first
        assert door.refused == {"full": 2}
        assert (door.admission.running, door.admission.waiting) == (0, 0)

    run(scene())


def test_a_key_that_fills_the_queue_does_not_shut_out_another() -> None:
    async def scene() -> None:
        door = Door(running=1, waiting=4)
        crowd = [asyncio.create_task(door.visit(ALICE, f"alice{number}")) for number in range(5)]
        await asyncio.sleep(0)
        await door.visit(BOB, "bob")
        assert door.order.index("bob") <= 2
        ends = await asyncio.gather(*crowd, return_exceptions=True)
        assert [isinstance(end, ApiError) for end in ends] == [False, False, False, False, True]
        assert door.refused == {"full": 1}
        assert (door.admission.running, door.admission.waiting) == (0, 0)

    run(scene())


def test_who_gives_up_waiting_leaves_no_gap() -> None:
    async def scene() -> None:
        door = Door(running=2)
        first = asyncio.create_task(door.visit(ALICE, "first", stay_s=5))
        await asyncio.sleep(0)
        wide = asyncio.create_task(door.visit(ALICE, "wide", places=2))
        await asyncio.sleep(0)
        narrow = asyncio.create_task(door.visit(ALICE, "narrow"))
        await asyncio.sleep(1)
        assert door.order == ["first"]
        wide.cancel()
        await narrow
        assert asyncio.get_running_loop().time() < 3
        await first
        assert door.admission.running == 0

    run(scene())


def test_a_request_wider_than_the_door_comes_in_alone() -> None:
    async def scene() -> None:
        door = Door(running=2)
        await door.visit(ALICE, "wide", places=5)
        assert door.admission.running == 0

    run(scene())


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (Key("a", requests_per_minute=3), "requests"),
        (Key("a", tokens_per_minute=90), "tokens"),
    ],
)
def test_limits_of_a_key_are_for_a_minute(key: Key, reason: str) -> None:
    async def scene() -> None:
        door = Door()
        for _ in range(3):
            await door.visit(key, "one")
            door.admission.spent(key, 30)
        with pytest.raises(ApiError) as caught:
            await door.visit(key, "one")
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        assert door.refused == {reason: 1}
        await door.visit(BOB, "not concerned")
        assert caught.value.retry_after_s is not None
        await asyncio.sleep(caught.value.retry_after_s)
        await door.visit(key, "again")

    run(scene())


def test_requests_at_once() -> None:
    async def scene() -> None:
        door, key = Door(), Key("a", concurrent=1)
        first = asyncio.create_task(door.visit(key, "first"))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="1 requests at once"):
            await door.visit(key, "second")
        await first
        await door.visit(key, "third")

    run(scene())


def test_a_key_is_found_by_its_hash_alone(tmp_path: Path) -> None:
    secret, lines = new_key("alice")
    assert secret not in lines
    file = tmp_path / "keys.toml"
    file.write_text(lines + 'scopes = ["generate"]\nconcurrent = 4\n')
    ring = load_keys(file)
    found = ring.find(secret)
    assert found is not None
    assert (found.name, found.scopes, found.concurrent) == ("alice", ("generate",), 4)
    assert ring.find(secret[:-1]) is None
    assert ring.find("") is None
    assert isinstance(ring, KeyRing)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no \\[\\[key\\]\\]"),
        ("[[key", "not TOML"),
        ('[[key]]\nname = "a"', "no hash"),
        ('[[key]]\nname = "a"\nhash = "sk-secret"', "no hash"),
        ('[[key]]\nhash = "sha256:00"', "no name"),
        (f'[[key]]\nname = "a"\nhash = "{hash_of("x")}"\ncolour = "red"', "colour"),
        (f'[[key]]\nname = "a"\nhash = "{hash_of("x")}"\nscopes = ["all"]', "no scope"),
        (f'[[key]]\nname = "a"\nhash = "{hash_of("x")}"\nconcurrent = 0', "concurrent"),
        (2 * f'[[key]]\nname = "a"\nhash = "{hash_of("x")}"\n', "two keys"),
    ],
)
def test_a_key_file_that_is_wrong_is_refused_before_anybody_relies_on_it(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_keys(file)


async def test_keys_over_http(tiny: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secrets = {}
    file = tmp_path / "keys.toml"
    limits = {
        "alice": 'scopes = ["generate"]\nconcurrent = 1\n',
        "bob": 'scopes = ["swarm"]\n',
        "eve": 'models = ["x"]\n',
    }
    for name, more in limits.items():
        secrets[name], lines = new_key(name)
        with file.open("a") as out:
            out.write(f"{lines}{more}\n")
    async with serve(tiny, source=folder_of(tiny), api_key_file=file) as served:

        async def get(path: str, key: str | None) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
            return (await served.http.get(path, headers=headers)).status

        assert [await get(path, None) for path in ("/", "/health", "/v1/models", "/api/swarm")] == [200, 200, 401, 401]
        assert await get("/v1/models", "sk-llmasos-wrong") == 401
        assert await get("/v1/models", secrets["alice"]) == 200
        assert await get("/metrics", secrets["alice"]) == 403
        assert await get("/metrics", secrets["bob"]) == 200
        assert await get("/v1/models", secrets["bob"]) == 403
        assert await get("/v1/models/tiny", secrets["eve"]) == 404
        await refused_while_busy(served, secrets["alice"])
    assert not any(secret in caplog.text for secret in secrets.values())


async def refused_while_busy(served: Served, secret: str) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "logit_bias": {"2": -100}, "stream": True}
    headers = {"Authorization": f"Bearer {secret}"}
    first = await served.http.post("/v1/completions", json=body, headers=headers)
    second = await served.http.post("/v1/completions", json=body, headers=headers)
    assert (second.status, second.headers["Retry-After"]) == (429, "1")
    await first.read()
