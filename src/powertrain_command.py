"""The command `powertrain`, in a file whose name nobody else's has.

For DeepSpeed accelerate puts the working directory on its ranks' PYTHONPATH, where a train.py or a folder data/ of the
user's would be taken for ours.
"""

import os
import sys


def main() -> None:
    """Leave the working directory out of where modules are found, and run the verb."""
    if not _is_working_directory(os.path.dirname(__file__)):
        sys.path[:] = [path for path in sys.path if not _is_working_directory(path)]
        if paths := os.environ.get("PYTHONPATH"):
            left = [path for path in paths.split(os.pathsep) if not _is_working_directory(path)]
            os.environ["PYTHONPATH"] = os.pathsep.join(left)
    from powertrain.launch.__main__ import main

    main()


def _is_working_directory(path: str) -> bool:
    return os.path.isdir(path or ".") and os.path.samefile(path or ".", ".")


if __name__ == "__main__":
    main()
