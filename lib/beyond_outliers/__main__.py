"""`python -m beyond_outliers` is the command `beyond-outliers`, also under torchrun."""

import sys

from beyond_outliers.cli import main

if __name__ == "__main__":
    sys.exit(main())
