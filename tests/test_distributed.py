"""The launcher's environment variables: right ones pass, wrong ones are named."""

from __future__ import annotations

import pytest

from sentcompress.distributed import check_environment
from sentcompress.errors import InputError

RIGHT = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_the_variables_that_torchrun_sets_pass(monkeypatch):
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', not a number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0"),
        ("RANK", "5", "RANK is 5 but WORLD_SIZE is 2"),
        ("MASTER_PORT", "x", "MASTER_PORT is 'x', not a number"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, name, value, message):
    for known, right in RIGHT.items():
        monkeypatch.setenv(known, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as refused:
        check_environment()
    assert "sentcompress launch or torchrun" in refused.value.fix
