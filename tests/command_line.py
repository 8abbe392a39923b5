"""Calls commands of ``autoslim`` in this process, and parses their output."""

import re

from small_project import error_of
from typer.testing import CliRunner

from autoslim.cli.main import app


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_from(*arguments: str) -> str:
    """Returns the error message of a command that must fail: one line on stderr, exit code 1."""

    def run() -> None:
        app(list(arguments))

    return error_of(run)


def table(text: str, first: str) -> list[dict[str, str]]:
    """Returns the lines of a plain table whose header begins with ``first``, by header."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    headers = re.split(r"\s{2,}", lines[start].strip())
    rows = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        rows.append(dict(zip(headers, re.split(r"\s{2,}", line.strip()), strict=False)))
    return rows


def facts(text: str) -> dict[str, str]:
    return dict(
        re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if re.match(r"[A-Za-z,% ]+\S  +\S", line)
    )
