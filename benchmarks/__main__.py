"""Run the benchmarks, all or those named, one process each, and write the report."""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.report import SCRIPTS, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "name", nargs="*", choices=SCRIPTS, help=f"one of {', '.join(SCRIPTS)}", metavar="name"
    )
    for name in parser.parse_args().name or SCRIPTS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py")], check=True)
    main()
