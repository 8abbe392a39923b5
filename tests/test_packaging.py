"""The wheel: it contains every file of the package, and its metadata state what was tested."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from paths import ROOT


def test_the_wheel_has_all_files_of_the_package_and_its_metadata(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "autoslim", source / "autoslim", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = (name for name in archive.namelist() if name.endswith("/METADATA"))
        fields = message_from_bytes(archive.read(metadata))
    expected = {path for path in (source / "autoslim").rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(source)) for path in expected}
    assert "autoslim/pipeline/presets/cifar10.yaml" in names
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown"
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", "\n".join(fields.get_all("Classifier")))]
    assert minors == list(range(11, 14))
    assert sorted(fields["Requires-Python"].split(",")) == ["<3.14", ">=3.11"]
