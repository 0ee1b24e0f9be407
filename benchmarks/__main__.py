"""Run the benchmarks, all or those named, one process each, and write the report."""

import subprocess
import sys
from pathlib import Path

from benchmarks.report import SCRIPTS, main

if __name__ == "__main__":
    for name in sys.argv[1:] or SCRIPTS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py")], check=True)
    main()
