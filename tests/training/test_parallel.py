"""The devices of a step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fmbench.errors import UserError
from fmbench.training import parallel


@pytest.mark.parametrize(("platform", "remedy"), [("gpu", ", or one GPU: CUDA_VISIBLE_DEVICES=0."), ("tpu", "2.")])
def test_who_has_two_gpus_is_told_how_to_use_one(platform, remedy):
    mesh: Any = SimpleNamespace(size=2, devices=np.array([SimpleNamespace(platform=platform)] * 2))
    with pytest.raises(UserError) as error:
        parallel.check_batch_size("batch_size", 25, mesh)
    assert str(error.value).startswith("config.batch_size is 25, which 2 devices cannot share equally; ")
    assert str(error.value).endswith(f"take a multiple of 2{remedy.removeprefix('2')}")
