"""Cluster: what is said where Ray is not installed."""

import sys

import pytest

from lapilli.cluster import connect
from lapilli.errors import ConfigError
from lapilli.serve.distributed import run_distributed
from lapilli.serve.options import ServeOptions


def test_without_ray_the_way_out_is_an_option_that_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--engine ray needs Ray: .*, or leave --engine out"):
        run_distributed(
            pytest.fail, ServeOptions(), print, replicas=1, cores=1, device="cpu", rows=1
        )
    with pytest.raises(ConfigError, match=r"several workers need Ray: .*, or ask for one worker"):
        connect()
