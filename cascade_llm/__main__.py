"""`python -m cascade_llm`: the command line, where the command `cascade-llm` is not on the path."""

import sys

from cascade_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
