"""Lets a command import torch and transformers without the parts that no command of ours ever calls.

transformers' model code is decorated for torch.compile, placed for torch.distributed, and brings the losses of its
training recipes: importing that takes as long as torch does, and leaves 110 MB. A peer does not compile, is no rank of
anything, and does not train. So the decorators are answered here, the compiler itself is imported when somebody asks it
for more than them, and transformers is told that the other two are not installed.

For processes that are ours: `import_lean` changes what the whole process sees. Whoever imports `llmasos` as a library
keeps transformers as it is.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
_OF_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"
"""A file inside of it that transformers' masks take a class from. It needs nothing else of the compiler."""
_NOT_HERE = ("is_scipy_available", "is_torch_distributed_available")


def import_lean() -> None:
    """Import torch and transformers so. Does nothing where somebody has paid for all of it already."""
    if "transformers" in sys.modules or _COMPILER in sys.modules:
        return
    import torch

    spec = importlib.util.find_spec(_COMPILER)
    assert spec is not None, "torch has its compiler inside"
    compiler = importlib.util.module_from_spec(spec)
    vars(compiler).update(dict.fromkeys(_DECORATORS, _as_it_is))
    compiler.__class__ = _Postponed
    sys.modules[_COMPILER] = torch._dynamo = compiler
    importlib.import_module(_OF_MASKS)
    del compiler.__path__

    from transformers import utils
    from transformers.utils import import_utils

    for name in _NOT_HERE:
        setattr(import_utils, name, _never)
        setattr(utils, name, _never)


class _Postponed(ModuleType):
    """The compiler before its code has run. Whoever asks it for more than the decorators makes it run, and so does
    whoever imports another file of it, since that begins with asking for its `__path__`.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        spec: Any = self.__spec__
        self.__path__ = spec.submodule_search_locations
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return (lambda inner: inner) if function is None else function


def _never(*_: Any) -> bool:
    return False
