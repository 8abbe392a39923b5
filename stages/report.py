"""Stage ``report``: see ``autoslim.pipeline.report``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
import typer


@with_clear_errors
def main() -> None:
    """Compares the methods on the test split, which no earlier stage has used."""
    from autoslim.pipeline.report import run  # after entry, which sets what torch reads when it is imported

    run()


if __name__ == "__main__":
    typer.run(main)
