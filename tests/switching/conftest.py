"""No test leaves a switch on for the next."""

import pytest

import twins


@pytest.fixture(autouse=True)
def all_off():
    yield
    twins.all_off()
