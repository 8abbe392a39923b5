"""Settings for all tests."""

from autoslim.tracing.propagate import STRICT

STRICT.set(True)  # an error in a slimming rule fails the test instead of making layers not prunable
