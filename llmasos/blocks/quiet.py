"""Keeps the libraries' own progress bars and warnings off the screen while we load, and puts them back after."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub
from transformers.utils import logging as transformers


@contextmanager
def quiet() -> Iterator[None]:
    """No log line below an error and no progress bar from transformers inside, no news of the hub's retries; all as
    before outside."""
    verbosity, hub_verbosity = transformers.get_verbosity(), hub.get_verbosity()
    bars = transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    hub.set_verbosity(logging.ERROR)
    transformers.disable_progress_bar()
    try:
        yield
    finally:
        transformers.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            transformers.enable_progress_bar()
