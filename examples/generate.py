"""The shortest program: join a swarm, write a text, say who computed it.

python -m llmasos.peer --blocks 0:30     # prints a multiaddr
python examples/generate.py MULTIADDR
"""

import sys

from llmasos import LLMasOS

with LLMasOS(endpoint=sys.argv[1]) as client:
    result = client.generate("The world is", max_new_tokens=24, return_full_text=True)
    print(result.text)
    for hop in result.route:
        print(f"blocks {hop.blocks} ran on {hop.peer}", file=sys.stderr)
