"""A process of ours is spared what it never calls, and gets it when it does."""

import subprocess
import sys

SPARED = ["torch._dynamo.utils", "torch._inductor", "torch.distributed.tensor", "scipy", "sympy"]


def run(code: str) -> str:
    """stdout of a Python process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_peer_imports_no_compiler_no_training_and_no_algebra() -> None:
    loaded = run(
        "import sys\n"
        "from llmasos.blocks.lean import import_lean\n"
        "import_lean()\n"
        "from llmasos.peer.serve import load_blocks, resolve, Span\n"
        "load_blocks(resolve('smollm2'), Span(0, 1))\n"
        f"print([name for name in {SPARED} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_who_asks_for_the_compiler_gets_it() -> None:
    doubled = run(
        "from llmasos.blocks.lean import import_lean\n"
        "import_lean()\n"
        "import torch\n"
        "from transformers import LlamaForCausalLM\n"
        "double = torch.compile(lambda x: 2 * x, backend='eager')\n"
        "print(double(torch.ones(3)).tolist(), torch._dynamo.is_compiling(), torch._dynamo.utils.counters['stats'])"
    )
    assert doubled.startswith("[2.0, 2.0, 2.0] False Counter({'calls_captured': 1")


def test_nothing_changes_where_transformers_is_there_already() -> None:
    kept = run(
        "import transformers.modeling_utils\n"
        "from transformers.utils import is_scipy_available, is_torch_distributed_available\n"
        "from llmasos.blocks.lean import import_lean\n"
        "import_lean()\n"
        "print(is_scipy_available(), is_torch_distributed_available())\n"
    )
    assert kept == "True True"
