"""Tags and parameters of runs: where a result comes from, and which weights it uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from autoslim.errors import UserError


def fingerprint(weights: Path) -> str:
    """Returns the first 12 hex digits of a file's SHA-256.

    The tag ``supernet`` is the fingerprint of the supernet's weights, on the run that trained it and on all runs that
    use it. The filter ``tags.supernet = "…"`` selects all of them, so no run ids have to be stored.
    """
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def lineage(weights: Path) -> dict[str, str]:
    """Returns the tag ``supernet`` of a run that uses these weights; an empty dict if there are none."""
    from autoslim.training.checkpoints import has_weights

    with contextlib.suppress(UserError):  # there is no file, or it is damaged
        if has_weights(weights):
            return {"supernet": fingerprint(weights)}
    return {}


def origin() -> dict[str, str]:
    """Returns tags with the commit and the DVC experiment of this process, if they are known.

    The commit of an experiment is the one that it starts from. The suffix ``-dirty`` means that tracked files differ
    from the commit; ``dvc.lock`` is ignored, because DVC rewrites it between stages.
    """
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")
    tags = {"dvc_experiment": os.environ.get("DVC_EXP_NAME", "")}
    if commit:
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)dvc.lock")
        tags |= {"mlflow.source.git.commit": commit, "commit": commit[:10] + ("-dirty" if dirty else "")}
    return {key: value for key, value in tags.items() if value}


def _git(*arguments: str) -> str:
    """Returns the output of a git command in the working directory; empty if it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def flattened(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flattens nested values to dotted keys, such as ``{"search.stop": "0.2"}``; all but strings become JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
