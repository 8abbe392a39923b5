"""Checkpoint keys: what changes them, what does not, and what a user reads when a checkpoint is not used."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from autoslim.pipeline import checkpoint_keys
from autoslim.pipeline.checkpoint_keys import KeyedCheckpoints, code_digest, imported_modules


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Returns a copy of the package whose modules the digests read."""
    copy = shutil.copytree(ROOT / "autoslim", tmp_path / "autoslim", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(checkpoint_keys, "_PACKAGE", copy)
    checkpoint_keys._imports.cache_clear()
    yield copy
    checkpoint_keys._imports.cache_clear()


def digest() -> str:
    return code_digest(imported_modules("autoslim.pipeline.supernet"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_comments_docstrings_and_layout_do_not_change_the_digest(package: Path) -> None:
    before = digest()
    for path in package.rglob("*.py"):
        path.write_text(f"# A comment.\n{path.read_text()}\n\n# Another one.\n")
    rule = package / "supernet/sandwich.py"
    texts = re.findall(r'""".*?"""', rule.read_text(), flags=re.DOTALL)
    assert len(texts) > 5  # of the module, of functions and classes, and below constants
    for text in texts:
        edit(rule, text, '"""Rewritten."""')
    assert digest() == before


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("supernet/sandwich.py", "loss.backward()", "(2 * loss).backward()"),
        ("training/recipe.py", "fused=True", "fused=False"),
        ("channels/grid.py", "0.9 * value", "0.8 * value"),  # imported by a module that the stage imports
    ],
)
def test_code_that_the_stage_imports_changes_the_digest(package: Path, module: str, old: str, new: str) -> None:
    before = digest()
    edit(package / module, old, new)
    assert digest() != before


@pytest.mark.parametrize(
    "module", ["report/table.py", "search/greedy.py", "pipeline/tracking/stage.py", "training/progress.py"]
)
def test_code_that_cannot_change_the_result_leaves_the_digest_alone(package: Path, module: str) -> None:
    before = digest()
    (package / module).write_text((package / module).read_text() + "\nEXTRA = 1\n")
    assert digest() == before


@pytest.mark.parametrize("module", ["autoslim.supernet.train", "autoslim.search.search", "autoslim.training.retrain"])
def test_all_modules_that_an_import_loads_are_followed(module: str) -> None:
    """Python's own imports are the truth; those inside functions are followed too."""
    code = f"import sys, {module}; print(*[name for name in sys.modules if name.startswith('autoslim')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    followed = imported_modules(module)
    assert loaded - checkpoint_keys.OBSERVERS <= followed
    assert not followed & checkpoint_keys.OBSERVERS


def checkpoints(root: Path, **parts: Any) -> KeyedCheckpoints:
    return KeyedCheckpoints(root, "supernet", {"supernet.epochs": 3, "code": "a", "torch": torch.__version__} | parts)


def test_the_same_parts_find_the_same_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = checkpoints(tmp_path)
    with first.lock():
        first.save("supernet", {"step": 1})
    again = checkpoints(tmp_path)
    with again.lock():
        assert again.load("supernet") == {"step": 1}
    assert capsys.readouterr().err == ""


def test_an_unused_checkpoint_is_reported_with_the_parts_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoints(tmp_path)
    with first.lock():
        first.save("supernet", {"step": 1})
    changed = checkpoints(tmp_path, **{"supernet.epochs": 4, "code": "b"})
    with changed.lock():
        assert changed.load("supernet") is None
        changed.save("supernet", {"step": 2})
    line = capsys.readouterr().err
    assert line == (
        f"supernet: the checkpoint {first.folder} is not used, because these differ: supernet.epochs, code\n"
    )
    with changed.lock():  # reported once
        pass
    assert capsys.readouterr().err == ""


def test_a_run_that_ends_before_its_first_checkpoint_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoints(tmp_path)
    with pytest.raises(RuntimeError), first.lock():
        raise RuntimeError
    assert not first.folder.exists()
    with checkpoints(tmp_path, code="b").lock():
        pass
    assert capsys.readouterr().err == ""


def test_checkpoints_of_other_stages_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = KeyedCheckpoints(tmp_path, "supernet-other", {"code": "a"})
    with other.lock():
        other.save("x", {"step": 1})
    with checkpoints(tmp_path).lock():
        pass
    assert capsys.readouterr().err == ""
