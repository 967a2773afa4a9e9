"""pyproject.toml says everything but how the kernels are compiled: see llmasos/blocks/native/compile.py."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FILE = Path(__file__).parent / "llmasos" / "blocks" / "native" / "compile.py"
spec = importlib.util.spec_from_file_location("compile", FILE)
assert spec is not None
assert spec.loader is not None
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildKernels(build_ext):
    """One shared library with a C interface, beside the Python that speaks it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        try:
            native.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except native.NoCompilerError as error:
            raise CompileError(f"no compiled kernels, torch will run all blocks: {error}") from error


# Optional: a machine without a C++ compiler gets the package without them.
setup(
    ext_modules=[Extension("llmasos.blocks.native._kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
