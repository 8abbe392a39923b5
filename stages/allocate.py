"""Stage ``allocate``: see ``autoslim.pipeline.allocate``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
import typer


@with_clear_errors
def main() -> None:
    """Writes each method's channels, so that only networks whose channels changed are retrained."""
    from autoslim.pipeline.allocate import run  # after entry, which sets what torch reads when it is imported
    from autoslim.pipeline.times import timed

    timed(run)


if __name__ == "__main__":
    typer.run(main)
