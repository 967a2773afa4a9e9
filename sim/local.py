"""A swarm of real processes on this machine, as `llmasos up` starts it: the demo, tests and benchmarks stand on it."""

from llmasos.local import LocalProcess, LocalSwarm, split_evenly

__all__ = ["LocalProcess", "LocalSwarm", "split_evenly"]
