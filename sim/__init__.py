"""The simulated side of the seams: virtual time, a network in memory, and whole swarms in one process."""
