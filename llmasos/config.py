"""Every constant of LLMasOS, with its unit and where it comes from, and the settings of each role.

A name ends in its unit: `_s` seconds, `_bytes`, `_tokens`, `_per_s`. "measured" refers to docs/log.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]
"""Numbers that rows may travel in, and blocks compute in."""

Codec = Literal["exact", "bfloat16", "int8"]
"""How rows are packed on their way from hop to hop."""

# --- the wire: what a peer accepts from a stranger -------------------------------------------------------------------

MAX_FRAME_BYTES = 64 * 2**20
"""Largest frame read or written: 1,000 tokens of the widest models in use (16,384 hidden, float32) fit."""
MAX_HIDDEN = 65_536
"""Largest hidden size in a tensor header; the widest published model has 18,432."""
MAX_STEP_TOKENS = 16_384
"""Most rows in one step. Clients send prompts in much smaller chunks (`ClientConfig.prompt_chunk_tokens`)."""
INT8_BLOCK = 64
"""Numbers that share a scale in the codec int8, as the weights of QLoRA do (Dettmers et al., 2023): a few activations
are hundreds of times as large as all others, and spoil their own block only. The scales add 6 % to the bytes."""
MAX_STREAMS_PER_PEER = 512
"""Streams that one remote peer may hold open here; a gateway with 256 sessions needs as many."""

# --- announcements ---------------------------------------------------------------------------------------------------

LEASE_S = 20.0
"""Life of a record. A killed peer is gone from every view after at most this long (the promise is 30 s)."""
ANNOUNCE_EVERY_S = LEASE_S / 3
"""A record survives two lost announcements."""
INDEX_LEASE_S = 3 * LEASE_S
"""Life of a peer's entry in the list of models, which is renewed as a record is. The name says nothing of the peer, and
all peers of all models write it under one key: so it is written less often, and may outlive the last of them."""
MAX_LEASE_S = 120.0
"""A record that claims to live longer than this is refused, so that nobody can pin a ghost."""
MAX_RECORD_BYTES = 2_048
"""A record of a peer with eight addresses is about 700 bytes."""
REJOIN_EVERY_S = 45.0
"""How often the bootstrap peers are asked again: without it a restarted bootstrap splits the DHT (measured)."""
LOOKUP_TIMEOUT_S = 10.0
"""A DHT look-up has no deadline of its own and can be hung by one bad node (measured)."""

# --- moving to other blocks (`--blocks auto`) ------------------------------------------------------------------------

LOOK_EVERY_S = 5.0
"""How often a peer looks whether it is of more use elsewhere. A lost holder is seen LEASE_S + this after its death."""
LOOKS_PER_S = 10.0
"""How often all peers of a model look, together: in a large swarm each looks less often, and somebody always does."""
URGENT_JITTER_S = 8.0
"""Blocks without a peer: each who could help waits a random part of this, and looks again, before it moves."""
JITTER_S = 60.0
"""The same when blocks are only weak."""
MIN_STAY_S = 300.0
"""Time between two moves of a peer that are not urgent; its sessions had to be moved, its weights loaded."""
MOVE_DRAIN_S = 10.0
"""For sessions to leave a peer that moves; they do at their next step, and failover brings in the others."""
URGENT_DRAIN_S = 2.0
"""The same when some blocks have no peer. No session can take a step then, so that none would leave: they wait for the
very blocks that this peer is about to bring. A session that steps all the same has found a peer that we have not."""

# --- sessions --------------------------------------------------------------------------------------------------------

SESSION_LEASE_S = 15.0
"""A session that sends neither a step nor a ping for this long is closed and its kv freed."""
PING_EVERY_S = SESSION_LEASE_S / 3
PONG_TIMEOUT_S = 1.5
"""A peer answers pings while it computes (measured: 1 ms), so one that is silent this long hangs or is cut off."""
MAX_PENDING_TOKENS = 4_096
"""Rows that one session may have waiting on a peer; beyond it the peer stops reading from whoever sends them."""
MAX_ROWS_IN_FLIGHT = MAX_PENDING_TOKENS // 2
"""Rows that a client sends ahead of their answers. A peer that stops reading does not hear pings either, so this stays
below what makes it stop; 16 chunks of a prompt keep as many hops busy."""
RECORDED_STEPS = 64
"""Outputs that a peer keeps by the number of their step, to answer repeated ones without computing them."""
SEND_TIMEOUT_S = 3.0
"""A peer that takes in nothing for this long, although little is under way to it, hangs; more for large frames."""
SLOW_LINK_BYTES_PER_S = 1.25e6
"""What the slowest link of a hop should carry (10 Mbit/s): how long a large frame may take is reckoned with it."""
PROMPT_STRETCH = 2.25
"""How much longer a token may take because of prompts in the same pass; more prompt rows wait for the next. Smaller
chunks cost prompts some speed, since the weights are read for each: a pass of this length still has the half of it."""
PREFIX_PAGE_TOKENS = 64
"""Sessions share the beginnings of prompts in units of so many tokens: a page of kv in the compiled blocks."""
PREFIX_SHARE = 0.25
"""Of a peer's room for kv, what may hold the beginnings of prompts that have been computed before."""
PREFIX_LEASE_S = 600.0
"""A beginning that nobody has asked for in this time is forgotten."""
MAX_PREFIX_PAGES = 256
"""Pages of a prompt that a client names, from its first token on: 16,384 tokens."""
HAND_OVER_RETRY_S = 5.0
"""How often a session looks for somebody to take over from a peer that drains, while there is nobody."""
ATTACH_TIMEOUT_S = 5.0
"""How long a link may wait for the session it belongs to: the client opens all hops at once, so they may cross."""
OPEN_TIMEOUT_S = 3.0
"""To reach a hop: as long as it takes to find out that one hangs. Dial, handshake and a frame take 2 ms on one machine
and five round trips elsewhere; a route goes on without whoever needs longer."""
CONNECT_TIMEOUT_S = 5.0
"""p2pd gives up a dial to a silent address after 5 s (measured)."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Where a process listens, whom it joins, and who it is."""

    host: str = "127.0.0.1"
    port: int = 0
    join: tuple[str, ...] = ()
    identity: Path | None = None
    listen: bool = True
    """False for clients: they dial out, take no inbound connection and store nothing for the DHT."""


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """What one peer serves and how much of the machine it may use."""

    model: str = "smollm2"
    blocks: str = "0:12"
    name: str = ""
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    """Weights of int8 (a scale per output) or int4 (a scale and a minimum per 64); rows stay as `dtype` says."""
    engine: str = "auto"
    """What runs the blocks: auto takes the compiled kernels where they fit, torch elsewhere."""
    max_blocks: int | None = None
    """Most blocks that `auto` may take; None takes as many as half of the free memory holds."""
    kv_tokens: int | None = None
    """Room for cached tokens; None takes a quarter of the free memory, at most `MAX_AUTO_KV_TOKENS`."""
    max_batch_tokens: int = 256
    """Rows of one forward pass: a prompt runs at the speed of matrix products. With a session that decodes in it a pass
    has fewer, as many as `PROMPT_STRETCH` allows at the speed of late."""
    drain_timeout_s: float = 30.0
    metrics_port: int | None = None
    """Where Prometheus may look; None shows nothing."""
    metrics_host: str = "127.0.0.1"
    network: NetworkConfig = field(default_factory=NetworkConfig)


MAX_AUTO_KV_TOKENS = 131_072
"""More than this one CPU peer cannot decode at a useful speed anyway."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How a client builds routes and how long it waits."""

    dtype: DType = "float32"
    quantization: str = "none"
    """Only peers that compute in these numbers are used: a route never mixes them."""
    codec: Codec = "exact"
    """How rows are packed between hops: bfloat16 is half the bytes of float32, int8 a quarter, and both change the
    numbers a little. For links slower than about 100 Mbit/s."""
    prompt_chunk_tokens: int = 128
    """Prompts travel in chunks of this many tokens, all in flight at once: hop 2 works on the first while hop 1 does
    the second. Smaller chunks fill the pipeline sooner, larger ones use the matrix units better."""
    speculate: bool = True
    """Guess tokens from the text and check several in one step, while that is measured to pay. Changes no text."""
    draft_model: str = ""
    """Guess with this model, on this machine: the name of a smaller one with the same vocabulary."""
    share_prefixes: bool = True
    """Let peers keep the kv of prompts for later ones of this client that begin alike. They learn which do, not how."""
    step_timeout_s: float = 30.0
    """A step that every hop claims to be alive for, and nobody answers, is given up after this long."""
    suspect_after_s: float = 1.5
    """A step that takes longer has its hops pinged: a hung peer is found `PONG_TIMEOUT_S` later, a busy one answers.
    Once a session knows how long its steps take, four times that is enough (but half a second at least)."""
    open_timeout_s: float = OPEN_TIMEOUT_S
    """To connect and be admitted; whoever takes longer is passed over for another."""
    max_failovers: int = 20
    """Attempts at one step; a swarm that loses peers faster than that has no route to offer."""
    wait_for_blocks_s: float = 30.0
    """How long a running generation waits for lost blocks to come back before it fails."""
    refresh_every_s: float = 5.0
    """Age at which the view of the swarm is looked up again, before the next route is planned."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where the gateway listens, whom it lets in, and how much at once."""

    host: str = "127.0.0.1"
    port: int = 8000
    models: tuple[str, ...] = ()
    """Directories and .gguf files that it may load; aliases and hub ids that the swarm serves it finds by itself."""
    api_key_file: Path | None = None
    """Without one, whoever reaches the port may use it."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call it; of no other."""
    max_running: int = 64
    """Texts written at once. More share the same passes of the peers, until their kv is full."""
    max_waiting: int = 256
    max_wait_s: float = 60.0
    """A request that has waited this long for its turn is refused."""
    max_body_bytes: int = 4 * 2**20
    """A prompt of 131,072 tokens has about 600,000 characters."""
    default_chat_tokens: int = 512
    """Of an answer whose length was left open: each hop reserves kv for it."""
    default_completion_tokens: int = 16
    """The same for plain completions; OpenAI's own number."""
    keep_alive_s: float = 15.0
    """A stream that is silent this long gets a comment, so that proxies do not cut it."""
    write_timeout_s: float = 30.0
    """A client that takes in nothing for this long is taken to be gone."""
    status_age_s: float = 1.0
    """How old the view of the swarm may be that is shown."""
