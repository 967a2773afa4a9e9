"""What a gateway counts, for Prometheus. The names are part of the interface: deploy/ holds a dashboard for them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from llmasos.client.trace import StepTime

disable_created_metrics()  # type: ignore[no-untyped-call]  # when a counter began is a second series for each, and nobody asks for it

STEPS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One gateway's counters, in a registry of its own. The library adds `_total` to the names of counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here = self.registry
        self.requests = Counter("llmasos_requests", "Requests answered.", ["endpoint", "status"], registry=here)
        self.tokens = Counter("llmasos_tokens", "Tokens, of prompts and completions.", ["model", "kind"], registry=here)
        self.cached = Counter(
            "llmasos_cached_tokens",
            "Tokens of prompts that peers still held from earlier ones.",
            ["model"],
            registry=here,
        )
        self.first_token_s = Histogram(
            "llmasos_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ["model"],
            buckets=WAITS_S,
            registry=here,
        )
        self.token_s = Histogram(
            "llmasos_time_per_token_seconds",
            "Mean time of a token behind the first, one sample a text.",
            ["model"],
            buckets=WAITS_S,
            registry=here,
        )
        self.hop_s = Histogram(
            "llmasos_hop_seconds",
            "What the last step of a text took on one hop: in its queue, in its passes, on the network to it.",
            ["part"],
            buckets=STEPS_S,
            registry=here,
        )
        self.failovers = Counter("llmasos_failovers", "Lost hops replaced in running texts.", ["model"], registry=here)
        self.refused = Counter("llmasos_requests_refused", "Requests refused at the door.", ["reason"], registry=here)
        self.cancelled = Counter("llmasos_requests_cancelled", "Requests whose client went away.", registry=here)
        self.running = Gauge("llmasos_texts_running", "Texts being written.", registry=here)
        self.waiting = Gauge("llmasos_requests_waiting", "Requests that wait for a place.", registry=here)
        self.peers = Gauge("llmasos_swarm_peers", "Peers online.", ["model"], registry=here)
        self.weakest = Gauge(
            "llmasos_swarm_weakest_block_peers", "Peers of the block that has the fewest.", ["model"], registry=here
        )

    def saw_step(self, step: StepTime | None) -> None:
        """A text is finished, and this was its last step."""
        for hop in step.hops if step is not None else ():
            for part, spent_ms in (("queue", hop.queue_ms), ("compute", hop.compute_ms), ("network", hop.network_ms)):
                self.hop_s.labels(part).observe(spent_ms / 1e3)

    def page(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
