import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import tests.conftest  # noqa: F401 - its hook comes before the first import of contraflow
from tests.planted import Bug, __doc__, bugs

TESTS = Path(__file__).parents[1]


def run(paths: list[str], cache: str, *more: str) -> tuple[int, str]:
    """Exit code and output of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more, *(f"tests/{p}" for p in paths)]
    env = os.environ | {
        "NPROC": "1", "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }  # fmt: skip
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdict(bug: Bug, folders: Queue[str]) -> str:
    """caught: a test failed. survived: none did. broken: pytest could not run them."""
    folder = folders.get()
    code, output = run(list(bug.tests), folder, "-x", "-p", "tests.planted.plugin", "--planted", bug.name)
    folders.put(folder)
    if code == 1:
        return "caught"
    return "survived" if code == 0 else f"broken: {' '.join(output.split())[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.planted", None, __doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", help="bugs whose names contain one of these")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    planted = [bug for name, bug in bugs().items() if any(p in name for p in chosen.patterns or [""])]
    if not planted:  # pytest would take no test for all of them
        print(f"no bug has a name that contains {' or '.join(chosen.patterns)}")
        return 2
    begin, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        # One folder of compiled programs for each process at a time: entries are not written atomically.
        folders: Queue[str] = Queue()
        for job in range(chosen.jobs):
            folders.put(str(Path(folder) / str(job)))
        code, output = run(sorted({test for bug in planted for test in bug.tests}), str(Path(folder) / "0"))
        if code:
            print(f"{output[-3000:]}\nthe tests fail as they are")
            return 2
        with ThreadPoolExecutor(chosen.jobs) as pool:
            for bug, said in zip(planted, pool.map(lambda bug: verdict(bug, folders), planted), strict=True):
                bad += said != "caught"
                print(f"{said:10s} {bug.name}", flush=True)
    print(f"{len(planted) - bad} of {len(planted)} caught, {(time.monotonic() - begin) / 60:.1f} min")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
