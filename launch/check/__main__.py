"""`python -m powertrain.launch.check`."""

from powertrain.launch.check import main

if __name__ == "__main__":
    main()
