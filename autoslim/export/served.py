"""The code of the MLflow model, which classifies image files where autoslim is not installed.

The model contains a copy of this module and of those that it imports (see ``copy_code``).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.export.predictor import Predictor

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = "autoslim_model"
"""The name of the package in the model. It differs from autoslim, which may be installed too."""

_COPIED = ("errors", "data/images", "export/predictions", "export/predictor", "export/served")


class ImageClassifier:
    """Classifies the contents of image files."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, images: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Returns the most probable class of each image, and the probabilities of the most probable ones.

        Args:
            images: the column ``image`` contains the bytes of image files, such as PNG or JPEG.
            params: ``top`` is the number of classes in the column ``probabilities``; by default 5.
        """
        import pandas as pd

        pixels = [self._predictor.pixels(image, f"row {row}") for row, image in enumerate(images["image"])]
        found = self._predictor.predict(pixels, int((params or {}).get("top", 5)))
        return pd.DataFrame(
            {
                "class": [prediction.label for prediction in found],
                "probability": [prediction.probability for prediction in found],
                "probabilities": [prediction.probabilities for prediction in found],
            }
        )


def _load_pyfunc(path: str) -> ImageClassifier:
    """Loads the model from its folder of data. MLflow calls this function by its name."""
    import torch

    network = torch.export.load(Path(path, "model.pt2")).module()
    about = json.loads(Path(path, "autoslim.json").read_text(encoding="utf-8"))

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return ImageClassifier(Predictor(about, run))


def copy_code(folder: Path) -> Path:
    """Copies the code that the model needs as the package ``PACKAGE`` into ``folder``, and returns its path."""
    source, package = Path(__file__).parents[1], folder / PACKAGE
    package.mkdir()
    for name in _COPIED:
        text = (source / f"{name}.py").read_text(encoding="utf-8")
        text = re.sub(r"^from autoslim\.(?:\w+\.)*(\w+) import", rf"from {PACKAGE}.\1 import", text, flags=re.M)
        (package / f"{Path(name).name}.py").write_text(text, encoding="utf-8")
    (package / "__init__.py").touch()
    return package
