"""nbval compares a cell's output where the cell asks for it; a result that `mmkit.expect`
does not expect fails the cell in any case, so that no lost point goes unseen."""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    outcome = yield
    outputs = getattr(item, "test_outputs", None) or []  # of a cell that nbval ran
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    if unexpected := [line for line in lines if line.startswith("✗")]:
        pytest.fail("\n".join(unexpected), pytrace=False)
    return outcome
