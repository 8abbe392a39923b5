"""Stage ``search``: see ``autoslim.pipeline.search``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
import typer


@with_clear_errors
def main() -> None:
    """Slims the supernet greedily and records every step."""
    from autoslim.pipeline.search import run  # after entry, which sets what torch reads when it is imported
    from autoslim.pipeline.times import timed

    timed(run)


if __name__ == "__main__":
    typer.run(main)
