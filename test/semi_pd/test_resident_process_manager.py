"""Tests of the switching controllers and of life cycles, under the path of the design documents.

Runs by pytest, or as a program: ``python test/semi_pd/test_resident_process_manager.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest

from tests.unit.semi_pd.test_lifecycles import *  # noqa: F403
from tests.unit.semi_pd.test_switching import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
