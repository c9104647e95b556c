"""python -m ray_jobs is the `rayfuse` command."""

from ray_jobs.cli import main

if __name__ == "__main__":
    main()
