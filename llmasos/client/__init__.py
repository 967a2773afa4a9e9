"""The client: tokenize, embed, send through the swarm, sample, decode."""
