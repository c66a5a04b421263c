"""`ray job submit -- python -m jobs.tune RUN [--root URI] [--set a.b=v]`: the step of the same name."""

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
