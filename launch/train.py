"""`powertrain train`: as `accelerate launch train.py`, in one process unless a launcher starts it."""

from powertrain.train.cli import main

if __name__ == "__main__":
    main()
