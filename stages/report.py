"""Stage ``report``: see ``autoslim.pipeline.report``."""

import typer

from autoslim.pipeline.entry import with_clear_errors


@with_clear_errors
def main() -> None:
    """Compares the methods on the test split, which no earlier stage has used."""
    from autoslim.pipeline.report import run  # after entry, which sets what torch reads when it is imported

    run()


if __name__ == "__main__":
    typer.run(main)
