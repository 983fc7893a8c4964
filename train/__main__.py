"""`python -m powertrain.train`: the same as `powertrain train`."""

from powertrain.train.cli import main

if __name__ == "__main__":
    main()
