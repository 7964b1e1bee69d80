"""`python -m rankfold`: the same command line as `rankfold`."""

from rankfold.cli import main

if __name__ == "__main__":
    main()
