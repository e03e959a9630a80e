"""No test leaves a switch on for the next."""

import weakref

import pytest

import twins
from halfstep.switching import facades
from halfstep.switching.machinery import take_away_dropped
from halfstep.switching.switch import Switch


@pytest.fixture(autouse=True)
def all_off(monkeypatch):
    made = []
    init = Switch.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Switch, "__init__", noted)
    yield
    twins.all_off()
    for switch in reversed(made):
        if switch() is not None:
            switch().off()
    take_away_dropped()
    facades.take_away()
