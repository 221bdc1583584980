"""The allocator setting takes effect where it can and is harmless elsewhere."""

import platform
import sys

import pytest

from tessera.training.memory import reuse_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_it_takes_effect_under_glibc() -> None:
    assert reuse_freed_memory() is True


def test_elsewhere_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reuse_freed_memory() is False
