"""`python -m codistill`, and what `torchrun -m codistill` starts."""

import sys

from codistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
