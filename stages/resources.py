"""Stage ``resources``: see ``autoslim.pipeline.resources``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
import typer


@with_clear_errors
def main() -> None:
    """Measures latency where it is limited, and checks that the budget can be reached before anything is trained."""
    from autoslim.pipeline.resources import run  # after entry, which sets what torch reads when it is imported
    from autoslim.pipeline.times import timed

    timed(run)


if __name__ == "__main__":
    typer.run(main)
