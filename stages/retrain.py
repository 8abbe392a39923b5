"""Stage ``retrain``: see ``autoslim.pipeline.retrain``."""

from autoslim.pipeline.entry import with_clear_errors  # first: from here on, Ctrl-C prints one line

# isort: split
from typing import Annotated

import typer


@with_clear_errors
def main(method: Annotated[str, typer.Argument(help="A method of params.yaml, such as autoslim.")]) -> None:
    """Trains the network of one method."""
    from autoslim.pipeline.retrain import run  # after entry, which sets what torch reads when it is imported
    from autoslim.pipeline.times import timed

    timed(run, method)


if __name__ == "__main__":
    typer.run(main)
