"""`python -m train`, which works from an installed wheel too."""

from train.cli import main

if __name__ == "__main__":
    main()
