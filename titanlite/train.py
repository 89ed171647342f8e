"""What torchrun starts: `python -m titanlite.train RECIPE [--section.key=value …]`, alone or as one of many ranks."""

import sys

from titanlite.cli.main import end_as_launched
from titanlite.cli.train import main

if __name__ == "__main__":
    end_as_launched(main, sys.argv[1:])
