"""`python -m powertrain.launch.sweep`."""

from powertrain.launch.sweep import main

if __name__ == "__main__":
    main()
