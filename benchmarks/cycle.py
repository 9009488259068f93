"""Time one distillation cycle of this engine by phase; cases/cycle.py has the code and the documentation."""

from dpdmd import command  # isort: skip  # noqa: F401  first: the others take seconds, in which a user may interrupt

import sys

from cases.cycle import main

if __name__ == "__main__":
    sys.exit(main())
