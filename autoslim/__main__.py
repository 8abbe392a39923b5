"""``python -m autoslim``: the command ``autoslim``."""

from autoslim.cli.main import main

if __name__ == "__main__":
    main()
