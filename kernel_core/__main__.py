"""`python -m kernel_core` is `kernel`."""

import sys

from kernel_core.cli import main

sys.exit(main())
