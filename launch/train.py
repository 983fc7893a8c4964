"""`powertrain train`: the same as `powertrain train` and `accelerate launch train.py`."""

from powertrain.train.cli import main

if __name__ == "__main__":
    main()
