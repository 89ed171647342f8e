"""`python -m titanlite`: the same as the `titanlite` command."""

import sys

from titanlite.cli import main

sys.exit(main())
