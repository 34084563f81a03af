"""Tests of the parts of semi-PD, under the path of the design documents.

Runs by pytest, or as a program: ``python test/semi_pd/test_semi_pd_features.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest

from tests.unit.semi_pd.test_semi_pd_paths import *  # noqa: F403
from tests.unit.semi_pd.test_storage_manager import *  # noqa: F403
from tests.unit.semi_pd.test_switching import *  # noqa: F403
from tests.unit.slo.test_slo_control import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
