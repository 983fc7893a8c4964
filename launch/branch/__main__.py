"""`python -m powertrain.launch.branch`."""

from powertrain.launch.branch import main

if __name__ == "__main__":
    main()
