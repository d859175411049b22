"""``python -m batchrun`` is ``batchrun``."""

from __future__ import annotations

from batchrun.cli import main

if __name__ == "__main__":
    main(prog_name="batchrun")
