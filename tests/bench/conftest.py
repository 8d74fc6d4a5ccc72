from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """No benchmark is a test of the extension: what it compares is whatever the ops call."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.same_without_extension)
