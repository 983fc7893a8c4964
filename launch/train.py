"""`powertrain train`: the same as `python -m train` and `accelerate launch train.py`."""

from train.cli import main

if __name__ == "__main__":
    main()
