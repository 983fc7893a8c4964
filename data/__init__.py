"""Text to token files to training samples; knows nothing of models, schedules or engines."""

import os

if __name__ != "powertrain.data":
    raise ImportError("This folder is the package powertrain.data; import it by that name.")


class DataError(ValueError):
    """Something a user can put right: one readable paragraph with the value, the limit and the remedy."""


def expand(path: str | os.PathLike[str]) -> str:
    """The path with the home folder for a ~ at its beginning.

    Raises:
        DataError: it is not known.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise DataError(
            f"The home folder in {expanded!r} is not known: HOME is not set, or there is no such user. Set HOME, or "
            "give an absolute path (./~NAME for a file of that name)."
        )
    return expanded
