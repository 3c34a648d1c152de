"""What a launcher says to a process, and says wrongly."""

from __future__ import annotations

import pytest

from sentcompress.errors import InputError
from sentcompress.launched import check_environment

RIGHT = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_what_torchrun_says_is_right(monkeypatch):
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', no number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0"),
        ("RANK", "5", "RANK is 5 and WORLD_SIZE 2"),
        ("MASTER_PORT", "x", "MASTER_PORT is 'x', no number"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
    ],
)
def test_what_cannot_be_is_named(monkeypatch, name, value, said):
    for known, right in RIGHT.items():
        monkeypatch.setenv(known, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said) as refused:
        check_environment()
    assert "sentcompress launch or torchrun" in refused.value.fix
