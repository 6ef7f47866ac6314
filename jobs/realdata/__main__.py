"""`python -m jobs.realdata [NAME...] -o FOLDER`: fetch and pack; without a name, list what there is.

Sources go to FOLDER/NAME/, what is packed to FOLDER/NAME.h5 (weights: FOLDER/NAME.safetensors). What is there stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpc.errors import UserError
from hpc.preempt import ExitCode
from jobs.realdata.catalogue import DATA, WEIGHTS
from jobs.realdata.making import make
from jobs.realdata.wheels import Unavailable


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.realdata", description="Fetch and pack real data.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, default=Path("recipes-data"), metavar="FOLDER")
    options = parser.parse_args()
    if not options.names:
        for name, one in (DATA | WEIGHTS).items():
            print(f"{name:<24}{one.summary} ({', '.join(one.wheels)})")
        return ExitCode.DONE
    try:
        for name in options.names:
            make(name, options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (Unavailable, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CRASH
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
