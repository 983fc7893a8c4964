"""`python -m powertrain.launch.estimate`."""

from powertrain.launch.estimate import main

if __name__ == "__main__":
    main()
