"""Print a text while it is written, and stop it at the end of the first sentence.

python examples/stream.py MULTIADDR
"""

import sys

from llmasos import LLMasOS, MissingBlocksError

with LLMasOS(endpoint=sys.argv[1]) as client:
    try:
        pieces = client.stream_text("Once upon a time", max_new_tokens=40, temperature=0.8, seed=7, stop=".")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(".")
    except MissingBlocksError as error:  # peers went away and none came back: what was written is not lost
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
