"""`python -m dilated_factory`: the command line without its script."""

import sys

from dilated_factory.cli import main

if __name__ == "__main__":
    sys.exit(main())
