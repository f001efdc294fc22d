"""`python -m kvrelay.cli`: how the supervisor starts its children."""

import sys

from kvrelay.cli.main import main

sys.exit(main())
