"""`python -m powertrain.launch.bench`."""

from powertrain.launch.bench import main

if __name__ == "__main__":
    main()
