"""`make fuzz`: many cases for each reader, counted in one table; exit code 1 unless all of them are right or refused.

    python -m helpers.fuzz [--seed N] [--cases 2000] [READER …]
    python -m helpers.fuzz --repeat FILE

Cases follow from the seed. One that fails is printed and its input written to fuzz-failures/, for --repeat.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from helpers.fuzz import REFUSED, RIGHT, SilentError, adapters, rows, runs
from helpers.fuzz import settings as settings_reader
from helpers.random_adapters import Drawn, Site

READERS = {"settings": settings_reader, "rows": rows, "adapters": adapters, "runs": runs}
OUTCOMES = (RIGHT, REFUSED, "traceback", "hang", "silent")
SECONDS = 10  # a case that takes longer is a hang
MOST_TOLD = 20  # failures of a reader that are printed
FAILURES = Path("fuzz-failures")
NAMES = {"nan": float("nan"), "inf": float("inf"), "torch": torch, "Drawn": Drawn, "Site": Site}  # in a case's repr


class _HangError(BaseException):
    pass


def _ring(*_: Any) -> None:
    raise _HangError


def outcome(reader: str, case: Any) -> tuple[str, str]:
    """(one of OUTCOMES, what happened where it is none of the first two)."""
    signal.signal(signal.SIGALRM, _ring)
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        try:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                found = READERS[reader].judge(case, Path(name))
            return found, ""
        except _HangError:
            return "hang", traceback.format_exc(limit=-6)
        except SilentError as error:
            return "silent", str(error)
        except BaseException as error:  # SystemExit too: a reader never ends the process
            if isinstance(error, KeyboardInterrupt):
                raise
            return "traceback", traceback.format_exc(limit=-6)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(reader: str, start: int, count: int) -> Counter:
    """Outcomes of `count` cases; each that fails is printed and written."""
    counts, number = Counter[str](), 0
    getattr(READERS[reader], "prepared", dict)()  # what its cases have in common takes longer than a case may

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(READERS[reader].CASES)
    def each(case: Any) -> None:
        nonlocal number
        number += 1
        random.seed(0)
        numpy.random.seed(0)
        found, what = outcome(reader, case)
        counts[found] += 1
        if found not in (RIGHT, REFUSED) and counts.total() - counts[RIGHT] - counts[REFUSED] <= MOST_TOLD:
            FAILURES.mkdir(exist_ok=True)
            path = FAILURES / f"{reader}-{start}-{number}.txt"
            path.write_text(repr(case), encoding="utf-8", errors="surrogatepass")
            print(f"\n{reader} case {number} of seed {start}: {found}; again: --repeat {path}\n{what}", flush=True)

    each()
    return counts


def main() -> int:
    """0 where no case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="a case of fuzz-failures/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.repeat:
        case = eval(options.repeat.read_text(encoding="utf-8", errors="surrogatepass"), NAMES)  # written by `fuzz`
        found, what = outcome(options.repeat.name.partition("-")[0], case)
        print(f"{found}\n{what}")
        return int(found not in (RIGHT, REFUSED))
    print(f"seed {options.seed}", flush=True)
    table, bad = [], 0
    for reader in options.readers or READERS:
        began = time.monotonic()
        counts = fuzz(reader, options.seed, options.cases)
        bad += sum(count for found, count in counts.items() if found not in (RIGHT, REFUSED))
        numbers = "".join(f"{counts[name]:>11,d}" for name in OUTCOMES)
        table.append(f"{reader:<10}{counts.total():>8,d}{numbers}{time.monotonic() - began:>9.0f}")
        print(table[-1], flush=True)
    heads = "".join(f"{name:>11}" for name in OUTCOMES)
    print("\n".join(["", f"{'reader':<10}{'cases':>8}{heads}{'seconds':>9}", *table]))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
