"""``autoslim.lock``: the version of autoslim that a project uses, and a digest of the code of each stage.

In a project outside the clone of this repository, DVC cannot watch autoslim's files, so that each stage depends on its
digest in this file instead. After an upgrade, ``autoslim init --upgrade`` rewrites the file, and DVC runs the stages
whose code changed. Until then, a stage refuses to run with other code, whose result DVC would take for the old code's.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version

from autoslim.errors import UserError
from autoslim.pipeline.checkpoint_keys import code_files
from autoslim.pipeline.params import read_yaml
from autoslim.pipeline.project import LOCK, STAGES


def stage_digest(stage: str) -> str:
    """Returns a digest of the files of autoslim whose code can change the result of ``stage``.

    It does not depend on the version of Python, unlike the digest in the key of a checkpoint.
    """
    digest = hashlib.sha256()
    for name, file in code_files(f"autoslim.pipeline.{stage}"):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def lock_text() -> str:
    """Returns the contents of ``autoslim.lock`` for the installed version."""
    lines = [f"  {stage}: '{stage_digest(stage)}'" for stage in STAGES]
    return "\n".join(["# Written by autoslim init.", f"version: {version('autoslim')}", "stages:", *lines, ""])


def check_lock(stages: Sequence[str] = STAGES) -> None:
    """Checks ``autoslim.lock`` in the working directory. A project without this file, such as the clone, passes.

    Raises:
        UserError: the file is damaged, or the installed code of one of ``stages`` is not that of the file.
    """
    if not LOCK.is_file():
        return
    values = read_yaml(LOCK)
    try:
        locked, digests = values["version"], {stage: values["stages"][stage] for stage in stages}
    except (KeyError, TypeError) as error:
        raise UserError(f"{LOCK} is damaged; write it again with `autoslim init --upgrade`") from error
    changed = [stage for stage, digest in digests.items() if digest != stage_digest(stage)]
    if changed:
        raise UserError(
            f"{LOCK} is from autoslim {locked}, and the installed autoslim {version('autoslim')} has other code for "
            f"{', '.join(changed)}; run `autoslim init --upgrade`, after which `dvc repro` runs the stages whose code "
            f"changed, or install autoslim {locked}"
        )
