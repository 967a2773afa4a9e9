"""What we have seen of peers with our own eyes: how fast, how far, how often they failed, what we have running there.

A peer's record is its word; this is our evidence. Nothing here reads a clock: the caller says when things happened, in
the network time of the records. Memory is bounded: beyond `MAX_PEERS` the peer that was seen longest ago is forgotten.

A failed peer is left alone for `BACKOFF_S`, twice as long after each further failure. It is then tried again, if it is
not too dear: a failure is on its price for a while. Only sessions that went well make us forget, each of them one
failure: who dies more often than not is soon left alone. What fails while it is left alone is the same news: one that
takes twenty sessions with it has died once. Who alone has some blocks may be asked before its time is over, and is
tried when it answers (`Scout.revive`).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from llmasos.routing.cost import DEFAULT_RTT_S, Load, Observed
from llmasos.routing.tickets import Ticket, Tickets

MAX_PEERS = 1_024
"""Peers remembered, about 0.5 kB each; a session has a handful of hops."""
BACKOFF_S = 1.0
"""After the first failure: about the time of a dropped connection to come back."""
MAX_BACKOFF_S = 120.0
"""As long as the longest lease: a peer that is still announced then deserves another try."""
MAX_FAILURES = 8
"""Beyond it the backoff does not grow: 2^7 s is over MAX_BACKOFF_S."""
HALF_LIFE_S = 300.0
"""Evidence counts half after five minutes: machines get busy and idle on that scale."""
MIN_GAIN = 0.1
"""Weight of the newest sample once there are many: the last ten tokens or so decide."""
MAX_EVIDENCE = 64.0
"""Steps; more would only slow down forgetting."""
OUTLIER = 3.0
"""A step counts for no more than so many times the mean of those before: one that waited for a lost packet would make a
near and fast peer look slow, and who looks slow is not used, so that nothing would correct it."""
FIRST_STEPS = 3
"""Before so many there is no mean to go by."""
RTT_SAMPLES = 5
"""Round trips remembered, of which the middle one counts: a lost packet makes one of them a hundred times as long."""
DISTRUST = 10.0
"""Times the backoff: after so long a failure says half as much. Of 3, 10, 30, 100 and for ever it is the best in the
simulator (docs/log.md); who fails again and again is distrusted for hours."""
MEMORY_STEPS = 10_000.0
"""Steps of hops from which it is told how often one is lost: a few minutes of a busy gateway."""
FEW_STEPS = 200.0
"""So many, a text's worth, are taken to have gone well before the first: one loss says little."""
MIN_KNOWN_RTTS = 3
"""From so many measured peers on, an unmeasured one is taken to be as far as the middle one."""


@dataclass(slots=True)
class _Ewma:
    """A mean that follows: the first samples count in full, later ones by MIN_GAIN and OUTLIER at most; evidence fades
    with time.
    """

    value: float = 0.0
    weight: float = 0.0
    at: float = 0.0

    def evidence(self, now: float) -> float:
        faded: float = 0.5 ** (max(0.0, now - self.at) / HALF_LIFE_S)
        return self.weight * faded

    def add(self, sample: float, now: float) -> None:
        weight = self.evidence(now)
        if self.weight >= FIRST_STEPS:
            sample = min(sample, OUTLIER * self.value)
        self.value += max(1.0 / (weight + 1.0), MIN_GAIN) * (sample - self.value)
        self.weight = min(weight + 1.0, MAX_EVIDENCE)
        self.at = max(self.at, now)


@dataclass(slots=True)
class _RoundTrip:
    """The middle one of the latest few, of two the shorter."""

    value: float = 0.0
    at: float = float("-inf")
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=RTT_SAMPLES))

    def add(self, sample: float, now: float) -> None:
        self.latest.append(sample)
        self.value = median_low(self.latest)
        self.at = max(self.at, now)


@dataclass(slots=True)
class _Peer:
    block_s: _Ewma = field(default_factory=_Ewma)
    rtt_s: _RoundTrip = field(default_factory=_RoundTrip)
    load: Load | None = None
    failures: int = 0
    failed_at: float = float("-inf")
    failed_until: float = float("-inf")
    refused_until: float = float("-inf")

    @property
    def backoff_s(self) -> float:
        """How long it is left alone after the latest failure."""
        return min(BACKOFF_S * 2.0 ** (self.failures - 1), MAX_BACKOFF_S)

    def recent_failures(self, now: float) -> float:
        faded: float = 0.5 ** (max(0.0, now - self.failed_at) / (DISTRUST * self.backoff_s))
        return self.failures * faded


class Health:
    """The evidence of one client. Passed to `plan` and `replan`; written by whoever runs sessions."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}  # in the order of last use
        self.tickets = Tickets()
        """Where sessions of ours run."""
        self._typical_rtt_s: float | None = DEFAULT_RTT_S  # None: to be computed again; …
        self._nearest_rtt_s: float | None = None  # … so here
        self._steps = FEW_STEPS  # of all hops, …
        self._losses = 0.0  # … and sessions that were lost on them

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._peers)

    # --- what happened ------------------------------------------------------------------------------------------------

    def saw_rtt(self, peer: str, seconds: float, now: float) -> None:
        """A round trip of a small message took `seconds`."""
        rtt_s = self._touch(peer).rtt_s
        before_s = rtt_s.value
        rtt_s.add(max(0.0, seconds), now)
        self._typical_rtt_s = None
        if self._nearest_rtt_s is not None and rtt_s.value <= self._nearest_rtt_s:
            self._nearest_rtt_s = rtt_s.value
        elif before_s == self._nearest_rtt_s:
            self._nearest_rtt_s = None

    def saw_load(self, peer: str, load: Load) -> None:
        """It said how busy it is."""
        self._touch(peer).load = load

    def saw_step(self, peer: str, blocks: int, seconds: float, now: float) -> None:
        """One decoding row took `seconds` through `blocks` blocks of `peer`, waiting included, the link not."""
        self._touch(peer).block_s.add(max(0.0, seconds) / blocks, now)
        self._steps += 1.0
        if self._steps > MEMORY_STEPS:
            self._steps /= 2
            self._losses /= 2

    def saw_route(self, hops: Sequence[tuple[str, int]], seconds: float, now: float) -> None:
        """One decoding row took `seconds` (links not included) through all `hops`: (peer, blocks) of each.

        Only the sum is known. What the proven hops do not explain falls to the others by their blocks; when all are
        proven, each by its share of what was expected.
        """
        known = [self.observed(peer, now) for peer, _ in hops]
        expected = [
            seen.block_s * blocks if seen.proven else 0.0 for seen, (_, blocks) in zip(known, hops, strict=True)
        ]
        unproven = sum(blocks for seen, (_, blocks) in zip(known, hops, strict=True) if not seen.proven)
        rest_s = max(0.0, seconds - sum(expected))
        for seen, expected_s, (peer, blocks) in zip(known, expected, hops, strict=True):
            if not unproven:
                self.saw_step(peer, blocks, seconds * expected_s / max(sum(expected), 1e-9), now)
            elif not seen.proven:
                self.saw_step(peer, blocks, rest_s * blocks / unproven, now)

    def failed(self, peer: str, now: float) -> None:
        """It broke off, timed out or broke the protocol: leave it alone for a while, longer each time."""
        known = self._touch(peer)
        if now < known.failed_until:
            return
        known.failures = min(known.failures + 1, MAX_FAILURES)
        known.failed_at = now
        known.failed_until = now + known.backoff_s

    def lost(self, peer: str, now: float) -> None:
        """It failed, and took a session of ours with it."""
        self._losses += 1.0
        self.failed(peer, now)

    def returned(self, peer: str, now: float) -> None:
        """It is there again: no need to leave it alone any longer, though its next failure counts as one more."""
        known = self._touch(peer)
        known.failed_until = min(known.failed_until, now)

    def refused(self, peer: str, retry_after_s: float, now: float) -> None:
        """It is full or draining and said so: no failure, but no use asking again before `retry_after_s`."""
        known = self._touch(peer)
        known.refused_until = max(known.refused_until, now + min(max(0.0, retry_after_s), MAX_BACKOFF_S))

    def succeeded(self, peer: str) -> None:
        """A session on it ended well."""
        known = self._touch(peer)
        known.failures = max(0, known.failures - 1)

    def opened(self, peer: str, session: str, tokens: int, now: float) -> Ticket:
        """A session of ours begins there and reserves `tokens` of kv. Until its next record only we know."""
        self._touch(peer)
        return self.tickets.open(peer, session, tokens, now)

    def closed(self, ticket: Ticket, now: float) -> None:
        """It is over on that peer. May be said twice."""
        self.tickets.close(ticket, now)

    # --- what it means ------------------------------------------------------------------------------------------------

    def avoided_for(self, peer: str, now: float) -> float:
        """Seconds that this peer is still to be left alone; zero for one in good standing."""
        known = self._peers.get(peer)
        return max(0.0, known.failed_until - now, known.refused_until - now) if known else 0.0

    def may_be_back(self, peer: str, now: float) -> bool:
        """Whether it is left alone for a failure that is older than the shortest backoff."""
        known = self._peers.get(peer)
        return known is not None and known.failed_at + BACKOFF_S <= now < known.failed_until

    def observed(self, peer: str, now: float, *, since: float = float("inf")) -> Observed:
        """Everything about one peer. `since` is when its record was made: what we opened later is ours to count."""
        known = self._peers.get(peer)
        if known is None:
            return Observed(
                rtt_s=self.typical_rtt_s, hoped_rtt_s=self.nearest_rtt_s, losses_per_step=self.losses_per_step
            )
        load = known.load
        if load is not None:
            if load.seen_at > since:
                since = load.seen_at
            else:
                load = None
        own_sessions = own_tokens = 0
        for ticket in self.tickets.on(peer):
            if ticket.opened_at >= since:
                own_sessions += 1
                own_tokens += ticket.tokens
        near, steps = known.rtt_s, known.block_s
        return Observed(
            near.value if near.latest else self.typical_rtt_s,
            steps.value,
            steps.evidence(now) if steps.weight else 0.0,
            known.recent_failures(now) if known.failures else 0.0,
            own_sessions,
            own_tokens,
            min(1.0, self.tickets.company(now)) if own_sessions else 1.0,
            load,
            self._hoped_rtt_s(near, now) if near.latest else self.nearest_rtt_s,
            self.losses_per_step,
        )

    def rtt_s(self, peer: str) -> float:
        """To a peer and back; what is typical, for one that was never measured."""
        known = self._peers.get(peer)
        return known.rtt_s.value if known is not None and known.rtt_s.latest else self.typical_rtt_s

    def measured(self, peer: str) -> bool:
        """Whether we know how far it is."""
        known = self._peers.get(peer)
        return known is not None and bool(known.rtt_s.latest)

    def heard_of(self, peer: str, *, since: float) -> bool:
        """Whether it has said how busy it is since then."""
        known = self._peers.get(peer)
        return known is not None and known.load is not None and known.load.seen_at > since

    @property
    def losses_per_step(self) -> float:
        """How many sessions a hop has cost us each step, whatever peer it was on."""
        return self._losses / self._steps

    @property
    def typical_rtt_s(self) -> float:
        """What to expect of a peer that was never measured: it should not look nearer or farther than the known."""
        if self._typical_rtt_s is None:
            known = [peer.rtt_s.value for peer in self._peers.values() if peer.rtt_s.latest]
            self._typical_rtt_s = median(known) if len(known) >= MIN_KNOWN_RTTS else DEFAULT_RTT_S
        return self._typical_rtt_s

    @property
    def nearest_rtt_s(self) -> float:
        """What to hope for of a peer that was never measured: to be as near as the nearest."""
        if self._nearest_rtt_s is None:
            known = (peer.rtt_s.value for peer in self._peers.values() if peer.rtt_s.latest)
            self._nearest_rtt_s = min(known, default=None)
            if self._nearest_rtt_s is None:
                return DEFAULT_RTT_S
        return self._nearest_rtt_s

    def _hoped_rtt_s(self, rtt: _RoundTrip, now: float) -> float:
        """What a round trip may be by now. One that was long is hoped to be as short as the nearest some day: who looks
        far is on no route, and only who is on one is asked.
        """
        faded: float = 0.5 ** (max(0.0, now - rtt.at) / HALF_LIFE_S)
        return self.nearest_rtt_s + faded * (rtt.value - self.nearest_rtt_s)

    def _touch(self, peer: str) -> _Peer:
        known = self._peers.pop(peer, None) or _Peer()
        self._peers[peer] = known
        if len(self._peers) > MAX_PEERS:
            # the longest unused first, and one that we have sessions on only when there is no other
            others = [name for name in self._peers if name != peer]
            del self._peers[next((name for name in others if not self.tickets.on(name)), others[0])]
            self._nearest_rtt_s = None  # it may have been that one
        return known
