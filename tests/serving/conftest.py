"""Fixtures that tests of servers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Iterator[None]:
    """vLLM's process groups, of this process alone."""
    from vllm_setup import process_groups

    with process_groups(tmp_path_factory.mktemp("groups") / "store"):
        yield
