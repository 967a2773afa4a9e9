"""Model management: find, verify, load and run a range of a model's blocks. No asyncio and no network in here."""
