"""`python -m scalepeft`: the same program as `scalepeft`."""

import sys

from scalepeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
