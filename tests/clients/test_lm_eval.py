"""`lm-eval` scores the swarm through the gateway as it scores the same checkpoint with transformers."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from llmasos.blocks.registry import resolve
from tests.clients.conftest import Running
from tests.commands import command

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: make clients"
)
TASKS = Path(__file__).parent / "tasks"


async def test_local_completions_scores_as_hf_does(running: Running, tmp_path: Path) -> None:
    """With the tokenizer of the gateway, which lm-eval finds by itself."""
    file = resolve("smollm2").source.file.path
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    offline["OMP_NUM_THREADS"] = "1"  # the peers compute beside it
    arguments = ["-m", "tests.clients.evaluate", running.url, str(file.parent), file.name]
    done = await command(*arguments, cwd=TASKS, env={**os.environ, **offline}, timeout_s=280)
    assert done.code == 0, done.stderr
    there, here = json.loads(done.stdout)
    assert there["results"]["capitals acc"] == here["results"]["capitals acc"] >= 0.8
    assert there["results"] == pytest.approx(here["results"], rel=1e-3)
    for task, samples in here["weighed"].items():
        for found, wanted in zip(there["weighed"][task], samples, strict=True):
            for (found_score, found_greedy), (score, greedy) in zip(found, wanted, strict=True):
                assert found_score == pytest.approx(score, abs=1e-3)
                assert found_greedy == greedy
