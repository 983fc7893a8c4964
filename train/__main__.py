"""`powertrain train`, which works from an installed wheel too."""

from powertrain.train.cli import main

if __name__ == "__main__":
    main()
