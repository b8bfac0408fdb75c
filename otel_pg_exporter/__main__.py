"""`python -m otel_pg_exporter`: the command line."""

import sys

from otel_pg_exporter.cli import main

sys.exit(main())
