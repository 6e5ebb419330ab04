"""``python -m sb3_pg``: the same as ``sb3-pg``."""

import sys

from sb3_pg.cli import main

if __name__ == "__main__":
    sys.exit(main())
