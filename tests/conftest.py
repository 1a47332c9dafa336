"""Models shared by all tests; a test leaves them as it found them, or works on a copy."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_llava


@pytest.fixture(scope="session")
def llava() -> Any:
    return tiny_llava("clip")


@pytest.fixture(scope="session")
def llava_siglip() -> Any:
    return tiny_llava("siglip")
