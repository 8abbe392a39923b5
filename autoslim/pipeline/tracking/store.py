"""The connection to an MLflow store: its address, its environment, and how long a server may take to answer."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import urlopen

from autoslim.errors import UserError, first_line
from autoslim.files import write_atomically
from autoslim.pipeline.experiment import shortened
from autoslim.pipeline.project import repository_root

if TYPE_CHECKING:
    from mlflow import MlflowClient


_ANSWER_S = 5.0  # time in which a server must answer before it is used
SILENCE_S = 600.0  # time in which a server that did not answer is not asked again
_TABLES = {"experiments", "experiment_tags", "latest_metrics", "metrics", "params", "runs", "tags"}  # in every version
_REPLACE = "move the file away, and the next stage makes a new one"
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # autoslim reports a failure once, in one line
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # otherwise two lines at the end of each run on a server
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",  # the check runs pip, which contacts the package index
    "MLFLOW_UV_AUTO_DETECT": "false",  # otherwise a uv.lock nearby is added to each model
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # with MLflow's default of 7, a lost server delays a stage by minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for hours, for which a stage would wait
}
"""Values of mlflow's environment variables, used unless the user has set them."""


def tracking_uri() -> str:
    """Returns ``MLFLOW_TRACKING_URI`` if it is set, else the SQLite file ``mlflow.db`` in the repository's root."""
    path = str(repository_root() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def artifact_folder(experiment: str) -> Path:
    """Returns the folder of an experiment's files: below ``mlartifacts`` for every name, such as ``..``."""
    return repository_root() / "mlartifacts" / (re.sub(r"[^\w.-]+", "-", experiment).lstrip(".") or "-")


def prepare_mlflow() -> None:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for logger in ("alembic", "urllib3.connectionpool"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints tracebacks of a full disk


def answers(uri: str, ask_again: bool = False) -> bool:
    """Returns whether a server answers within ``_ANSWER_S``; True if ``uri`` is not one of a server.

    A server that accepts a connection and never answers would delay every call by minutes. This is remembered in DVC's
    temporary folder, so that the next stages do not ask it again unless ``ask_again``. If the connection fails at once,
    MLflow reports why.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return True
    folder = repository_root() / ".dvc" / "tmp"
    silent = folder / f"mlflow-silent-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
    with suppress(OSError):
        if not ask_again and 0 <= time.time() - silent.stat().st_mtime < SILENCE_S:
            return False
    try:
        urlopen(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", timeout=_ANSWER_S).close()
    except (OSError, HTTPException) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            if folder.parent.is_dir():
                with suppress(OSError):
                    folder.mkdir(exist_ok=True)
                    silent.touch()
            return False
    with suppress(OSError):
        silent.unlink(missing_ok=True)
    return True


@contextmanager
def usable_store(ask_again: bool = False) -> Iterator[MlflowClient]:
    """Yields a client of the store, for commands that cannot work without it. Warnings are not shown.

    Args:
        ask_again: see ``answers``.

    Raises:
        UserError: the store cannot be used, at first or in the block.
    """
    prepare_mlflow()
    uri = tracking_uri()
    try:
        if not answers(uri, ask_again):
            raise ConnectionError("the server does not answer")
        with no_warnings():
            yield connect(uri)
    except Exception as failure:
        message = f"MLflow at {uri} cannot be used ({in_one_line(failure)}); correct MLFLOW_TRACKING_URI, or try later"
        raise UserError(redacted(message)) from failure


def connect(uri: str) -> MlflowClient:
    """Returns a client of the store at ``uri``. If it is a database, its tables are created if they do not exist."""
    from mlflow import MlflowClient

    if not _is_database(uri):
        return MlflowClient(uri)
    if file := sqlite_file(uri):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        # Seconds to wait while another stage writes; SQLite's default of 5 is too short.
        uri += "" if "?" in uri else "?timeout=60"
    with one_at_a_time(uri):  # two stages must not both create the tables
        # MLflow retries for two minutes; a single query fails fast.
        if file and not (Path(file).exists() and _tables(uri)):
            _create_store(uri, Path(file))
        found = _tables(uri)
        if file and found & _TABLES and (missing := _TABLES - found):
            raise ValueError(f"the file lacks MLflow's tables {', '.join(sorted(missing))}: {_REPLACE}")
        return MlflowClient(uri)


def sqlite_file(uri: str) -> str | None:
    """Returns the path of the SQLite file; None if the store is another one, or in memory."""
    import sqlalchemy

    return sqlalchemy.make_url(uri).database if uri.startswith("sqlite") else None


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Lets only one process change an SQLite file, or only one of this repository another store."""
    from filelock import FileLock

    file, folder = sqlite_file(uri), repository_root() / ".dvc"
    if file:
        lock = f"{file}.lock"
    elif folder.is_dir():
        (folder / "tmp").mkdir(exist_ok=True)
        lock = str(folder / "tmp" / "mlflow-experiment.lock")
    else:
        yield
        return
    with FileLock(lock, timeout=300):
        yield


def _tables(uri: str) -> set[str]:
    """Returns the names of the tables of a database.

    Raises:
        ValueError: the file is not a database.
    """
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    except sqlalchemy.exc.OperationalError:
        raise
    except sqlalchemy.exc.DatabaseError as error:
        raise ValueError(f"{first_line(error)}: {_REPLACE}") from error
    finally:
        engine.dispose()


def _create_store(uri: str, file: Path) -> None:
    """Creates MLflow's tables in a new SQLite file, all or none.

    This takes seconds, and MLflow can neither use nor complete a file in which a killed process created some of them.
    """
    import sqlalchemy
    from mlflow import MlflowClient

    def write(temporary: Path) -> None:
        for rest in (temporary, temporary.with_name(f"{temporary.name}-journal")):  # of a killed process
            rest.unlink(missing_ok=True)
        url = sqlalchemy.make_url(uri).set(database=str(temporary))
        MlflowClient(url.render_as_string(hide_password=False))

    write_atomically(file, write)


def _is_database(uri: str) -> bool:
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def id_of_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the id of an experiment, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server, MLflow's default is under the working directory, which DVC may delete.
        artifacts = artifact_folder(name).as_uri() if _is_database(uri) else None
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # otherwise MLflow's UI opens on chat traces
            return client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another process may have created it
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ValueError(f"experiment {name} was deleted; restore it or choose another name")
    return str(experiment.experiment_id)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_one_line(error: BaseException) -> str:
    return shortened(first_line(error), 200)


def warn(message: str) -> None:
    print(f"warning: {redacted(message)}", file=sys.stderr)


def redacted(message: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", message)  # user name and password in a URI
