"""Stage ``search``: see ``autoslim.pipeline.search``."""

import typer

from autoslim.pipeline.entry import with_clear_errors


@with_clear_errors
def main() -> None:
    """Slims the supernet greedily and records every step."""
    from autoslim.pipeline.search import run  # after entry, which sets what torch reads when it is imported

    run()


if __name__ == "__main__":
    typer.run(main)
