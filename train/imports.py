"""Imports that take seconds: torch, Transformers, and what stands on them."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Around the first import of torch: Python looks for no garbage meanwhile, and later for none in what is there.

    Modules make hundreds of thousands of objects, which live as long as the process. Searching them takes a third of
    the time of the imports, and goes on in the run and in every process that is forked from this one.
    """
    if "torch" in sys.modules:  # objects of a run may be there already, which are to be freed
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
