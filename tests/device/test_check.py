"""The check of a device: that it passes where it should, and that it can fail."""

import jax
import numpy as np
import pytest

from fmbench.device import check


@pytest.mark.slow
def test_a_cpu_passes_the_rehearsal():
    findings = list(check.check())
    assert [finding.name for finding in findings if not finding.ok] == []
    assert len(findings) == 7


def wrong_by(share):
    """A device whose bfloat16 is off by a share of the largest number."""

    def compute(dtype, device):
        return {"y": np.array([1.0, -4.0]) + (4 * share if dtype == "bfloat16" else 0)}

    return compute


def test_what_is_too_far_from_the_cpu_fails_and_is_named():
    distances = check.Distances()
    distances.add("good", wrong_by(0.09))
    assert distances.judge()[0]
    distances.add("bad", wrong_by(0.11))
    ok, detail = distances.judge()
    assert not ok
    assert detail == "highest precision float32 0e+00 of 1e-04 (good); float32 0e+00 of 2e-02 (good); " \
        "bfloat16 1e-01 of 1e-01 (bad)"  # fmt: skip


def test_not_a_number_fails():
    distances = check.Distances()
    distances.add("nan", lambda dtype, device: np.array([np.nan if dtype == "bfloat16" else 1]))
    assert not distances.judge()[0]


def test_an_error_in_one_part_is_its_failure_and_the_others_go_on(monkeypatch, capsys):
    def fails():
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel\nmore")

    for part in ("layers_agree", "steps_agree", "jit_and_pmap_agree", "resumes_to_the_same_bits"):
        monkeypatch.setattr(check, part, fails)
    monkeypatch.setattr(check, "programs_are_as_meant", lambda: (True, "fine"))
    findings = {finding.name: finding for finding in check.check()}
    assert findings["random numbers"].ok
    assert findings["programs"].ok
    assert findings["layers"].detail == "JaxRuntimeError: INTERNAL: no such kernel"
    assert str(findings["layers"]).startswith("FAILED layers: ")


def test_the_size_of_an_array_is_read_from_its_type():
    assert check._size("bf16[512,28,28,4]") == 512 * 28 * 28 * 4
    assert check._size("f32[]") == 1
