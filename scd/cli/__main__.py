"""`python -m scd.cli`, for launchers that start modules."""

import sys

from scd.cli import main

sys.exit(main())
