"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmasos.blocks.native import compile as build
from llmasos.blocks.native import variants
from llmasos.blocks.native.library import LIBRARY_VARIABLE

ROOT = Path(__file__).parents[2]
SCRIPT = """
import numpy as np
from llmasos.blocks.native import variants
from llmasos.blocks.native.stack import KINDS, Geometry
from tests.native.conftest import Recipe, rows_of

recipes = [
    Recipe(Geometry(50, 6, 2, 10, 37), biases=True, window=67, head_norms=True),
    Recipe(Geometry(33, 13, 1, 20, 70), post_norms=True, softcap=2.0, activation="gelu_tanh", rotary_width=8),
]
for recipe in recipes:
    hidden = recipe.geometry.hidden
    for kind in KINDS:
        stack = recipe.stack(kind, 3, variants()[0])
        a, b = stack.new_cache(), stack.new_cache()
        for chunks in ([(a, 0, 70), (b, 0, 1)], [(b, 1, 3), (a, 70, 1)], [(a, 71, 1)], [(a, 72, 14)]):
            rows = rows_of(sum(chunk[2] for chunk in chunks), hidden)
            stack.forward(0, 2, chunks, rows)
            stack.prepare()
            assert np.isfinite(rows).all()
        a.truncate(65)
        stack.forward(0, 1, [(a, 65, 2)], rows_of(2, hidden))
        del stack, a, b
print("clean")
"""


def test_no_byte_is_touched_that_is_not_ours(tmp_path: Path) -> None:
    compiler = build.compiler()
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute() or shutil.which(compiler) is None:
        pytest.skip(f"{compiler} brings no AddressSanitizer that can be preloaded")
    library = tmp_path / "kernels.so"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
    # The kernels are the same source with other registers: one variant stands for all, and compiles in 20 s.
    build.compile_library(library, flags, exempt=variants()[1:])
    environment = {
        **os.environ,
        LIBRARY_VARIABLE: str(library),
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"
