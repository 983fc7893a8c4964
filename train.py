"""So that `accelerate launch train.py +experiment=NAME` works; the code is in the package `powertrain.train`."""

from powertrain.train.cli import main

if __name__ == "__main__":
    main()
