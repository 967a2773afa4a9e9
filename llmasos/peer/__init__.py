"""The compute node: runs a span of blocks for many sessions at once and announces it."""
