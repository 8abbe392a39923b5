"""Stage ``report``: see ``autoslim.pipeline.report``."""

import typer

from autoslim.pipeline.entry import ending_clearly


@ending_clearly
def main() -> None:
    """Compares the methods on the test split, which no earlier stage has used."""
    from autoslim.pipeline.report import run  # after entry, which sets what torch reads when it is imported

    run()


if __name__ == "__main__":
    typer.run(main)
