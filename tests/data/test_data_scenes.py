from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from autoslim.data import scenes
from autoslim.data.prepare import prepare
from autoslim.data.prepared import SPLITS, PreparedData
from autoslim.data.scenes import COUNTS, SIDE, draw_scene, load_scenes_source


def test_scenes_are_split_without_overlap_and_balanced(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    info = prepare("scenes", folder, image_size=None, channels=None, search_images=1000, seed=0)
    assert (info.channels, info.image_size, info.storage) == (1, (SIDE, SIDE), "arrays")
    assert info.counts == {"train": 3000, "search": 1000, "test": 2000}
    data = PreparedData.open(folder)
    assert len({image.tobytes() for split in SPLITS for image in data.images(split)}) == 6000
    assert np.bincount(data.labels("search")).tolist() == [100] * 10
    assert np.ptp(np.bincount(data.labels("test"))) <= 10


def test_scenes_are_the_same_in_every_run() -> None:
    one, other = load_scenes_source(), load_scenes_source()
    for first, second in ((one.train, other.train), (one.test, other.test)):
        assert second is not None
        assert first is not None
        indices = (5, 0, len(first) - 1)
        pixels = [np.asarray(first.read(index)) for index in indices]
        assert [each.tobytes() for each in pixels] == [np.asarray(second.read(i)).tobytes() for i in indices]
        assert len({each.tobytes() for each in pixels}) == 3
        assert first.labels.tolist() == second.labels.tolist()


def test_no_digit_is_in_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digit that a scene shows or takes fragments of belongs to the scene's part, and gives it its class."""
    monkeypatch.setattr(scenes, "draw_scene", lambda digit, others, rng: (digit, others))
    digits = load_digits()
    targets = dict(
        zip((each.tobytes() for each in (digits.images / 16).astype(np.float32)), digits.target, strict=True)
    )
    source = load_scenes_source()
    pools = []
    for part, count in ((source.train, COUNTS["train"]), (source.test, COUNTS["test"])):
        assert part is not None
        drawn: list[Any] = [part.read(index) for index in range(len(part))]
        shown = [digit.tobytes() for digit, _ in drawn]
        pool = {digit.tobytes() for digit in drawn[0][1]}
        assert len(shown) == count
        assert all(others is drawn[0][1] for _, others in drawn)
        assert set(shown) == pool
        assert [targets[digit] for digit in shown] == part.labels.tolist()
        pools.append(pool)
    assert not pools[0] & pools[1]
    assert len(pools[0] | pools[1]) == len(digits.target)


def test_a_digit_is_in_front_of_the_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, a white square appears at one of the sizes and brightnesses, among black fragments."""
    monkeypatch.setattr(scenes, "NOISE", 0.0)
    white, black = (Image.fromarray(np.full((8, 8), value, np.float32)) for value in (1.0, 0.0))
    sides, corners = set(), set()
    for seed in range(100):
        image = draw_scene(white, [black], np.random.default_rng(seed))
        assert (image.mode, image.size) == ("L", (SIDE, SIDE))
        pixels = np.asarray(image)
        rows, columns = np.nonzero(pixels)
        assert len(set(pixels[rows, columns].tolist())) == 1
        assert 127 <= pixels.max() <= 255
        side = int(np.ptp(rows)) + 1
        assert np.ptp(columns) + 1 == side
        assert len(rows) == side**2
        sides.add(side)
        corners.add((int(rows.min()), int(columns.min())))
    assert sides == set(range(10, 17))
    assert len(corners) > 50
