"""Every annotation is enforced; every test starts from a seed of its own, printed when it fails."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("popart_func", "beartype.beartype")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    number = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(number)
    request.node.user_properties.append(("seed", number))
    return number


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    for name, value in item.user_properties:
        if report.failed and name == "seed":
            report.sections.append(("Random state", f"torch.manual_seed({value})"))
    return report


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without jaxtyping: for the library's own messages where a type is wrong, and for long loops."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
