"""Before anything big is installed: the Python, the free disk. Standard library only."""

import shutil
import sys

NEEDED_GB = 12  # the environment takes about 6; as much again while it is unpacked and for runs


def main() -> int:
    """Print what is wrong and return 1, or return 0."""
    problems = []
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        version = ".".join(map(str, sys.version_info[:3]))
        problems.append(f"Python {version}: 3.11 to 3.13 is needed; make PYTHON=python3.11 ...")
    free = shutil.disk_usage(".").free / 2**30
    if free < NEEDED_GB:
        problems.append(f"{free:.1f} GB free here: {NEEDED_GB} GB are needed; free some disk")
    for problem in problems:
        sys.stderr.write(f"rayfuse: {problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
