"""Stage ``supernet``: see ``autoslim.pipeline.supernet``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
import typer


@with_clear_errors
def main() -> None:
    """Trains the supernet by the sandwich rule with in-place distillation."""
    from autoslim.pipeline.supernet import run  # after entry, which sets what torch reads when it is imported
    from autoslim.pipeline.times import timed

    timed(run)


if __name__ == "__main__":
    typer.run(main)
