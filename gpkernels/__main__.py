"""`python -m gpkernels ...` is `gpkernels ...`."""

import sys

from gpkernels.cli import main

sys.exit(main())
