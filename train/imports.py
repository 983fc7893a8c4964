"""Imports that take seconds: torch, Transformers, and what imports them."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Around the first import of torch: no garbage collection meanwhile, nor later of the objects that exist by then.

    Modules make hundreds of thousands of objects, which live as long as the process. To search them for garbage takes a
    third of the time of the imports, and would take more in the run and in every process that is forked from it.
    """
    if "torch" in sys.modules:  # there may be objects of a run already, which have to be collected
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
