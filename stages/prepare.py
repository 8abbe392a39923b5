"""Stage ``prepare``: see ``autoslim.pipeline.prepare``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
import typer


@with_clear_errors
def main() -> None:
    """Splits the data into train, search and test, and checks every parameter of the pipeline against it."""
    from autoslim.pipeline.prepare import run  # after entry, which sets what torch reads when it is imported
    from autoslim.pipeline.times import timed

    timed(run)


if __name__ == "__main__":
    typer.run(main)
