"""python -m llmasos.blocks.native: say whether this machine has compiled kernels, and which."""

from llmasos.blocks.native import available, variants, why_not
from llmasos.console import say

if __name__ == "__main__":
    say(f"compiled kernels: {', '.join(variants())}" if available() else f"torch runs all blocks: {why_not()}")
