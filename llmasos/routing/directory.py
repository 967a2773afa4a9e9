"""The registry as a view: looked up once in the background, asked many times.

Peers and clients share it. It decides nothing; it only keeps a `SwarmView` as fresh as it was told to.
"""

import asyncio
import json
import logging
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from llmasos.errors import LLMasOSError
from llmasos.routing.records import MAX_ID_CHARS, ClockError, PeerRecord, RecordError
from llmasos.routing.view import SwarmView

if TYPE_CHECKING:
    from llmasos.network import Network

log = logging.getLogger(__name__)

MODELS_TOPIC = "models"
"""Under it each peer names the model that it serves, so that a stranger can ask what there is."""

MAX_MODELS = 128
"""Models looked up in one look at the swarm. A name costs a stranger one key pair, and everybody else a look-up."""
LOOKUPS_AT_ONCE = 16
"""Of those, how many at once: each waits for a round trip or two, so that a full look takes 8 times as long as one."""


def model_topic(model: str) -> str:
    """Under it each peer of a model publishes its record."""
    return f"model/{model}"


class Directory:
    """What the registry says of the swarm. `view` is replaced piece by piece as look-ups come in."""

    def __init__(self, network: "Network") -> None:
        self.view = SwarmView()
        self._network = network
        self._looked_up_at: dict[str, float] = {}
        self._warned_of: set[str] = set()
        self._looking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # one a model, while in use

    def age_s(self, model: str) -> float:
        """Seconds since the peers of `model` were last looked up; infinite when they never were."""
        return self._network.now() - self._looked_up_at.get(model, float("-inf"))

    async def refresh(self, model: str, *, max_age_s: float = 0.0) -> None:
        """Look the peers of `model` up, unless that was done within `max_age_s`. Callers at once share one look-up."""
        lock = self._looking.setdefault(model, asyncio.Lock())
        async with lock:
            if self.age_s(model) <= max_age_s:
                return
            found = await self._network.lookup(model_topic(model))
            now = self._network.now()
            self._looked_up_at[model] = now
            ahead_s: dict[str, float] = {}
            for peer, published in found.items():
                try:
                    self.view.add(PeerRecord.from_bytes(published.value, peer=peer, now=now), published.expires_at)
                except ClockError as error:
                    ahead_s[peer] = error.ahead_s
                except RecordError as error:
                    log.info("the record of peer %s is refused: %s", peer, error)
            self.view.expire(now)
            self._warn_of_clocks(ahead_s, everybody=bool(found.keys() - {self._network.peer_id} <= ahead_s.keys()))

    def _warn_of_clocks(self, ahead_s: dict[str, float], *, everybody: bool) -> None:
        """Say once whose clock is wrong: that of one peer, or ours, when all others are ahead of it."""
        new = {peer: seconds for peer, seconds in ahead_s.items() if peer not in self._warned_of}
        self._warned_of &= ahead_s.keys()  # a clock that was set is a new clock
        self._warned_of |= new.keys()
        if everybody and new:
            slow_s = median(new.values())
            log.warning("the clock of this machine seems to be %.0f s slow: set it, or nobody can be seen", slow_s)
            return
        for peer, seconds in new.items():
            log.warning("peer %s is passed over: its clock is %.0f s fast", peer, seconds)

    async def refresh_all(self) -> None:
        """Look up the models that peers name. Raises SwarmUnreachableError when none can be looked up.

        Of more than MAX_MODELS those come first that peers are known of, then those that most peers name.
        """
        named = await self._named()
        self._looked_up_at = {model: at for model, at in self._looked_up_at.items() if model in named}
        known = frozenset(self.view.models())
        models = sorted(named, key=lambda model: (model not in known, -named[model], model))
        if len(models) > MAX_MODELS:
            log.info("%d of %d models are not looked up", len(models) - MAX_MODELS, len(models))
        places = asyncio.Semaphore(LOOKUPS_AT_ONCE)

        async def look(model: str) -> LLMasOSError | None:
            async with places:
                try:
                    await self.refresh(model)
                except LLMasOSError as error:  # one model's failure is no reason to see none
                    log.info("the peers of %s cannot be looked up: %s", model, error.message)
                    return error
            return None

        async with asyncio.TaskGroup() as group:
            looks = [group.create_task(look(model)) for model in models[:MAX_MODELS]]
        failures = [error for task in looks if (error := task.result()) is not None]
        if failures and len(failures) == len(looks):
            raise failures[0]
        self.view.expire(self._network.now())  # also of the models that nobody names any more

    async def models(self) -> list[str]:
        """The models that peers say they serve, sorted."""
        return sorted(await self._named())

    async def _named(self) -> Counter[str]:
        """How many peers say that they serve each model."""
        named: Counter[str] = Counter()
        for peer, published in (await self._network.lookup(MODELS_TOPIC)).items():
            try:
                name = json.loads(published.value)["model"]
            except (ValueError, KeyError, TypeError, RecursionError):  # the last: of a thousand brackets
                name = None
            # as in a record: what is no topic, or cannot be printed, would stop whoever looks it up
            if isinstance(name, str) and 0 < len(name) <= MAX_ID_CHARS and name.isprintable():
                named[name] += 1
            else:
                log.info("peer %s names no model in %r", peer, published.value[:100])
        return named
