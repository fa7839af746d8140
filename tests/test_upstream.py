"""The faults of docs/upstream are there still: where one is mended, what fmbench does against it can go."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

PAGES = Path(__file__).parents[1] / "docs" / "upstream"


CPU = Path("/proc/cpuinfo")
FUSES = jax.__version__ >= "0.12" and CPU.exists() and "avx512_bf16" in CPU.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not FUSES, reason="seen with jax 0.12 on processors with AVX512_BF16 alone")
def test_the_fusion_for_ynnpack_is_wrong_in_bfloat16():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, PAGES / "ynnpack_bfloat16_fusion.py"],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    wrong = [float(share) for share in re.findall(r"([\d.]+)% wrong", done.stdout)]
    assert len(wrong) == 16
    assert wrong.pop(4) > 10  # all four operations, in bfloat16, with the fusion
    assert set(wrong) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("flax_quick_start.py", r"Flax [\d.]+, jax [\d.]+, jaxlib [\d.]+, \d+ cores: ([\d.]+) ms a step"),
        ("small_kernels.py", r"jax [\d.]+, jaxlib [\d.]+: (\d+) ns an iteration"),
    ],
)
def test_what_is_measured_for_public_reports_can_be_measured_again(script, line):
    done = subprocess.run(
        [sys.executable, PAGES / script],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert float(re.findall(line, done.stdout)[0]) > 0
    assert done.stderr == ""
