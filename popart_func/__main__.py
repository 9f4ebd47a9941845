"""``python -m popart_func`` is the command ``popart-func``."""

from popart_func.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
