import sys

from megapd.cli import main

sys.exit(main())
