"""`python -m projgrad`: the command line."""

from .experiments.cli import main

if __name__ == "__main__":
    main()
