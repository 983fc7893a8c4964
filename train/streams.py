"""Standard output and error that never raise: what cannot be written is dropped, and the run continues."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys


class Stream(io.TextIOWrapper):
    """Drops what cannot be written: the pipe is closed, the terminal is gone, the log's disk is full.

    It shares its buffer with the stream that it replaces, and so never closes it.
    """

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        self.flush()


def protect() -> None:
    """Make sure that standard output and error exist, take any character, and never raise."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the parent: the next file opened would get its number, and what others print
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            os.set_inheritable(opened, True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, f"__{name}__", stream)  # as Python does: what is not kept is closed
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Stream):
            with contextlib.suppress(OSError):
                stream.flush()
            unicode = codecs.lookup(stream.encoding).name.startswith("utf")
            protected = Stream(
                stream.buffer,
                encoding=stream.encoding,
                # One character for one keeps a table in shape; what UTF-8 lacks is a byte of a file's name.
                errors="backslashreplace" if unicode or name == "stderr" else "replace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, protected)
