"""`python -m powertrain.launch.decay`."""

from powertrain.launch.decay import main

if __name__ == "__main__":
    main()
