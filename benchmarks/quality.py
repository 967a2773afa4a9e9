"""What smaller numbers cost in quality: perplexity of a text, and how far its distributions are from float32's.

    python -m benchmarks.quality [--model smollm2]

One fixed text goes through all blocks in each kind of numbers; the ends stay in float32. KL is the mean over the
positions of KL(float32 || kind), in nats; `same` is how often both would choose the same next token. Then the same for
each codec, between three hops that compute in float32: rows are packed on the way into each, and not on the way back.
"""

import argparse
from typing import get_args

import torch

from llmasos.blocks.ends import ModelEnds, load_ends
from llmasos.blocks.layers import BlockChunk, load_blocks
from llmasos.blocks.registry import load_tokenizer, resolve
from llmasos.blocks.tensors import from_torch, to_torch
from llmasos.codec import pack, unpack
from llmasos.config import Codec
from llmasos.span import Span
from llmasos.wire import row_bytes
from sim.local import split_evenly

HOPS = 3
KINDS = (("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "int4"))
TEXT = """\
The history of the lighthouse begins with a fire on a hill. Long before there were towers, sailors steered by flames
that somebody, usually unpaid and often unnamed, kept burning through the night. The Greeks built the first that we
know by name, at Alexandria, on the island of Pharos: some hundred metres of limestone and granite, with a fire at
its top and a mirror, or so it was told, that could be seen from thirty miles away. It stood for sixteen centuries,
until earthquakes brought it down piece by piece, and its stones were used for a fort that is there to this day.

In the Middle Ages the work passed to monks. A chapel on a cape had a lamp in its highest window, and the brothers
who prayed there in the night were awake anyway. Harbours that grew rich on trade began to pay for lights of their
own, and with the money came taxes, and with the taxes came quarrels: who should pay for a light that everybody can
see? Economists still argue about that question, because the light does not grow dimmer when one more ship steers by
it.

The great change came in the nineteenth century, and it was made of glass. Augustin Fresnel, an engineer of roads
who was ill for most of his short life, found out how to bend the light of a single lamp into one flat beam with
rings of prisms. His lenses were so good that a flame no larger than a fist could be seen at the horizon, and within
fifty years there was hardly a coast without them. Keepers learned to polish brass, to trim wicks and to wind the
clockwork that turned the lens every few hours, and they wrote down in their books each ship, each storm and each
drop of oil. Then electricity came, and then machines that need no sleep. The last keepers climbed down, locked the
door behind them, and went to live in towns. What is left is a white tower on a rock, a light that nobody tends, and
the feeling, when one sees it from the sea at night, that somebody is awake.
"""


class Judge:
    """Prints how far the rows behind the last block are from the first ones that it was shown."""

    def __init__(self, ends: ModelEnds, ids: list[int]) -> None:
        self._ends = ends
        self._targets = torch.tensor(ids[1:])
        self._reference: torch.Tensor | None = None

    def judge(self, kind: str, size: float, rows: torch.Tensor) -> None:
        """(tokens, hidden)"""
        logprobs = torch.log_softmax(torch.cat([self._ends.logits(part) for part in rows.split(64)]), -1)[:-1]
        self._reference = reference = logprobs if self._reference is None else self._reference
        perplexity = torch.nn.functional.nll_loss(logprobs, self._targets).exp()
        divergence = torch.nn.functional.kl_div(logprobs, reference, reduction="batchmean", log_target=True)
        same = (logprobs.argmax(-1) == reference.argmax(-1)).float().mean()
        print(f"  {kind:<9} {size:>13.0f} {perplexity:>11.3f} {divergence:>9.5f} {100 * same:>5.1f}%")


@torch.inference_mode()
def main(model: str) -> None:
    spec = resolve(model)
    ends, ids = load_ends(spec), load_tokenizer(spec)(TEXT)["input_ids"]
    rows, span, judge = ends.embed(ids, 0), Span(0, spec.blocks), Judge(ends, ids).judge
    print(f"{spec.name}, {len(ids)} tokens of English prose")
    print(f"  {'':<9} {'MB of weights':>13} {'perplexity':>11} {'KL':>9} {'same':>6}")
    for dtype, quantize in KINDS:
        blocks = load_blocks(spec, span, dtype=dtype, quantize=quantize)
        chunk = BlockChunk(blocks.new_cache(), span, 0, rows.to(blocks.torch_dtype))
        kind = quantize if quantize != "none" else dtype
        judge(kind, blocks.weight_bytes / 1e6, blocks.forward([chunk])[0].float())
    print(f"  {'':<9} {'bytes a row':>13}")
    hops = [load_blocks(spec, span) for span in split_evenly(spec.blocks, HOPS)]
    for codec in get_args(Codec):
        passed = rows
        for blocks in hops:
            taken = to_torch(unpack(pack(from_torch(passed), codec)))
            passed = blocks.forward([BlockChunk(blocks.new_cache(), blocks.span, 0, taken)])[0]
        judge(codec, row_bytes(spec.hidden_size, "float32", codec), passed)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2")
    main(**vars(options.parse_args()))
