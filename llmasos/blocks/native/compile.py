"""Compiles the kernels: one shared library, spoken to through a C interface, without Python or torch in it.

Standard library only: `setup.py` runs this file before anything is installed.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
SOURCES = HERE / "src"
LIBRARY = HERE / "_kernels.so"

_COMMON = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread")
_KERNELS = (
    "-ffp-contract=off",  # what is rounded together is written in the source, and the same for all variants
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-uninitialized",  # GCC warns of its own AVX-512 headers
    "-Wno-maybe-uninitialized",
)
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *_AVX2)


class NoCompilerError(Exception):
    """There is none, or it does not take the sources; the message says which."""


def digest() -> str:
    """Of the sources and of how they are compiled: a library with another one is stale."""
    state = hashlib.sha256()
    for file in [*sorted(SOURCES.iterdir()), Path(__file__)]:
        state.update(file.name.encode() + b"\0" + file.read_bytes())
    return state.hexdigest()[:16]


def compiler() -> str:
    """The C++ compiler to use. Raises NoCompilerError."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise NoCompilerError(f"no C++ compiler found ({named or 'c++, g++, clang++'})")


def compile_library(target: Path = LIBRARY, flags: Sequence[str] = (), exempt: Collection[str] = ()) -> None:
    """Write the library to `target`. `flags` are for all but the kernels of `exempt` variants.

    Raises NoCompilerError.
    """
    command = compiler()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        units = list(_units(Path(folder), flags, exempt))
        list(threads.map(lambda unit: _run([command, *_COMMON, *unit]), units))
        objects = [unit[-1] for unit in units]
        built = Path(folder) / "library.so"
        _run([command, "-shared", "-pthread", *flags, *objects, "-o", str(built)])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old one mapped keeps it.
        fresh = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(built, fresh)
        fresh.replace(target)


def _units(folder: Path, extra: Sequence[str], exempt: Collection[str]) -> Iterator[list[str]]:
    """Arguments for each object file; the last is its path."""
    for file in sorted(SOURCES.glob("*.cpp")):
        if file.stem == "kernels":
            continue
        yield [*extra, f'-DLLMASOS_DIGEST="{digest()}"', "-c", str(file), "-o", str(folder / f"{file.stem}.o")]
    for variant, flags in _variants():
        name = str(folder / f"kernels_{variant}.o")
        extra_here = () if variant in exempt else extra
        yield [*extra_here, *_KERNELS, *flags, f"-DVARIANT={variant}", "-c", str(SOURCES / "kernels.cpp"), "-o", name]


def _variants() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "portable", ("-ftree-vectorize",)
    if platform.machine().lower() in ("x86_64", "amd64"):
        yield "avx2", _AVX2
        yield "avx512", _AVX512


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise NoCompilerError(f"{command[0]} does not compile the kernels: {first}")


if __name__ == "__main__":
    try:
        compile_library()
    except NoCompilerError as error:
        sys.exit(f"no compiled kernels, torch will run all blocks: {error}")
