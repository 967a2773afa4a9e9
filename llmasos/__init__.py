"""LLMasOS: an operating system for large language models over a swarm of peers."""
