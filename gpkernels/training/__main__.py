"""`python -m gpkernels.training ...` is `gpkernels train ...`, for launchers that start modules."""

import sys

from gpkernels.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
