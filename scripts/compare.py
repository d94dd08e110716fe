"""Compare optimizers on one task: `python scripts/compare.py --config configs/digits.yaml`.

Prints a table and writes `results.json` and `curves.png` to a fresh folder
below `runs/`. `--help` lists the options, each of which is also a YAML key.

Exit codes: 0 done; 2 something in the configuration is wrong, said in one
line; 130 interrupted.
"""

import sys

if __name__ == "__main__":
    try:
        # Imported here, since torch takes seconds in which one may interrupt too.
        from comparison.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        print("compare.py: interrupted", file=sys.stderr)
        sys.exit(130)
