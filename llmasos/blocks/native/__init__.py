"""Compiled kernels for Llama-shaped blocks on a CPU.

The C++ under `src/` knows floats and pages; `stack` is its face in Python, without torch. `facts` finds out whether a
family's blocks are what it computes, and `loading` fills it and compares it with the family's own code before anyone
relies on it. Where there is no compiled library, or the blocks are of another shape, torch runs them.
"""

from llmasos.blocks.native.library import available, variants, why_not

__all__ = ["available", "variants", "why_not"]
