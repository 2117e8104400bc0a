"""``python -m hypergrad`` is the command ``hypergrad``."""

from .cli import main

if __name__ == "__main__":
    main()
