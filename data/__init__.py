"""Text to token files to training sequences; knows nothing of models, schedules or engines."""

import os

if __name__ != "powertrain.data":
    raise ImportError("This folder is the package powertrain.data; import it by that name.")


class DataError(ValueError):
    """An error that a user can correct: one readable paragraph with the value, the limit and the remedy."""


def expand(path: str | os.PathLike[str]) -> str:
    """The path, with a ~ at its beginning replaced by the home folder.

    Raises:
        DataError: the home folder is not known.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise DataError(
            f"The home folder in {expanded!r} is not known: HOME is not set, or there is no such user. Set HOME, or "
            "give an absolute path (./~NAME for a file of that name)."
        )
    return expanded
