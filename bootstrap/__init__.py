"""A bootstrap: the address at which a swarm is met. It stores records and serves no blocks."""
