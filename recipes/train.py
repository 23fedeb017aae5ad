"""The main job: accelerate launch recipes/train.py --config FILE [key=value …]. The same as pm-hf train."""

import sys

from pm_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
