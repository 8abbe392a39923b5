"""Data and a supernet for searches of a real network."""

import pytest
from small_data import SPAN, prepared_digits, small_network
from specimens import shuffle_weights

from autoslim import Supernet, resize
from autoslim.data.prepared import PreparedData


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepared_digits(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    """Returns a supernet with random weights; a search does not require trained ones."""
    network, graph = small_network()
    wide = resize(network, graph, graph.grid(SPAN).widest)
    shuffle_weights(wide, seed=3)
    return Supernet(wide, graph)
