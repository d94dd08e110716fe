"""Train a network: `python scripts/train.py fit --config configs/train/digits_singd.yaml`.

Logs and checkpoints go to `trainer.default_root_dir`; `--ckpt_path last` resumes.
`fit --help` lists the options, each of which is also a YAML key; `fit --print_config`
prints them with their values.

Exit codes: 0 done; 2 something in the configuration is wrong, said in one line;
130 interrupted.
"""

import sys

if __name__ == "__main__":
    try:
        # Imported here, since torch takes seconds in which one may interrupt too.
        from training.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        sys.exit(130)
