"""Stage ``prepare``: see ``autoslim.pipeline.prepare``."""

import typer

from autoslim.pipeline.entry import with_clear_errors


@with_clear_errors
def main() -> None:
    """Splits the data into train, search and test, and checks every parameter of the pipeline against it."""
    from autoslim.pipeline.prepare import run  # after entry, which sets what torch reads when it is imported

    run()


if __name__ == "__main__":
    typer.run(main)
