"""Steps on many devices: read off programs, predicted by formulas whose results are known."""

import math

import pytest

from fmbench import scaling as command
from fmbench.pages import scaling as page
from fmbench.studies import compiled_step, interconnect
from fmbench.studies.compiled_step import Collective, CompiledStep, read_collectives
from fmbench.studies.interconnect import CHIPS, Chip, Link, communication_seconds, wire_bytes

# ml_collections loads config files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

HLO = """
  %all-reduce.2 = (f32[32]{0}, bf16[3,3,1,32]{3,2,1,0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), channel_id=1
  ROOT %ar = f32[10]{0} all-reduce(%d), replica_groups=[1,4]<=[4], to_apply=%add
  %twin = f32[10]{0} all-reduce(%e), to_apply=%add
  %g = (f32[8]{0}, f32[32]{0}) all-gather-start(%f), dimensions={0}
  %started = (pred[4,2]{1,0}, f32[30]{0}) all-reduce-start(%h, %i), to_apply=%or
  %done = pred[4,2]{1,0} all-reduce-done(%started)
  %add.1 = f32[1000]{0} add(%x, %all-reduce.2)
"""


def step(devices: int, batch_size: int, flops: float, *collectives: Collective) -> CompiledStep:
    return CompiledStep(devices, batch_size, 60_000, collectives, flops, 0, 0, 0.0, 0)


def ring(bytes_per_sec=1e6, hop_seconds=0.0, launch_seconds=0.0) -> Chip:
    return Chip("", {}, None, (Link("", math.inf, bytes_per_sec, hop_seconds),), launch_seconds, "")


def test_collectives_are_read_by_kind_size_and_number():
    assert read_collectives(HLO) == [
        Collective("all-reduce", 32 * 4 + 288 * 2 + 4, 1),
        Collective("all-reduce", 40, 2),
        Collective("all-gather", 128, 1),
        Collective("all-reduce", 8 + 120, 1),
    ]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 1200), ("all-gather", 600), ("reduce-scatter", 2400), ("collective-permute", 800)],
)
def test_bytes_around_a_ring_of_four(kind, sent):
    assert wire_bytes(Collective(kind, 800, 1), 4) == sent
    assert wire_bytes(Collective(kind, 800, 3), 4) == 3 * sent


def test_a_collective_takes_its_launch_its_hops_and_its_bytes():
    collectives = [Collective("all-reduce", 800, 2)]
    chip = ring(bytes_per_sec=100.0, hop_seconds=5.0, launch_seconds=7.0)
    assert communication_seconds(collectives, 4, chip) == pytest.approx(2 * (7 + 6 * 5 + 1200 / 100))
    assert communication_seconds(collectives, 1, chip) == 0


def test_levels_of_links_share_the_bytes_of_one_ring():
    collectives = [Collective("all-reduce", 4096, 1)]
    links = Link("near", 8, 100.0, 0.0), Link("far", math.inf, 10.0, 0.0)
    chip = Chip("", {}, None, links, 0.0, "")
    near, far = 2 * 7 / 8 * 4096, 2 * 3 / 4 * 4096 / 8
    assert near + far == wire_bytes(collectives[0], 32)
    assert communication_seconds(collectives, 32, chip) == pytest.approx(near / 100 + far / 10)
    assert communication_seconds(collectives, 8, chip) == pytest.approx(near / 100)


def test_efficiency_between_its_bounds():
    alone = step(1, 64, 1000.0)
    shared = step(4, 64, 250.0, Collective("all-reduce", 800, 1))
    found = interconnect.predict(shared, alone, ring(bytes_per_sec=24.0), 10.0)
    assert (found.compute_seconds, found.communication_seconds) == (25.0, 50.0)
    assert (found.without_overlap, found.with_full_overlap) == (pytest.approx(1 / 3), 0.5)
    own = step(4, 256, 1000.0, Collective("all-reduce", 800, 1))
    found = interconnect.predict(own, alone, ring(bytes_per_sec=24.0), 10.0)
    assert (found.without_overlap, found.with_full_overlap) == (pytest.approx(2 / 3), 1.0)


def test_where_scaling_stops_is_a_number_of_devices_that_share_the_batch():
    # A device computes 96 / n s and communicates 2 (n - 1) s: longer than it computes from n = 8 on, 12 < 14.
    collective = Collective("all-reduce", 0, 1)
    compiled = [step(n, 96, 96.0 / n, collective) for n in (1, 2, 32)]
    found = interconnect.limit(compiled, ring(hop_seconds=1.0), 1.0, strong=True)
    assert found == (8, 12, 32)  # 9.6 of 10 devices is no share; full overlap: 2 (n - 1) > 2 * 96 / n
    # With a batch each, 96 s: 2 (n - 1) > 96 from 50 on, which nobody compiled for.
    compiled = [step(n, 96 * n, 96.0, collective) for n in (1, 2, 32)]
    assert interconnect.limit(compiled, ring(hop_seconds=1.0), 1.0, strong=False) == (None, None, 32)


def test_a_real_step_adds_up_every_gradient_and_shares_the_work():
    flags = ["--config=mlp", "--config.data.source=sample"]
    alone, two = (compiled_step.compile_for(flags, devices, 480) for devices in (1, 2))
    assert two.collectives == (Collective("all-reduce", 4 * (384_854 + 2), 1),)  # gradients, loss, accuracy
    assert two.num_train == 480
    assert 0.5 < two.flops / alone.flops < 0.51  # Adam is every device's own
    assert 6 * 480 * 382_976 * 0.66 < alone.flops < 6 * 480 * 400_000  # the first layer's inputs need no gradient
    assert 0 < two.temporary_bytes < alone.temporary_bytes
    images, state = 785 + 3, 3 * 4 * 384_854
    assert two.resident_bytes > 480 * images + state


def test_what_devices_cannot_share_is_refused_in_the_table(capsys, monkeypatch):
    def compile_for(flags, devices, batch_size):
        if batch_size % devices:
            raise command.UserError(f"config.batch_size is {batch_size}, not for {devices}.")
        collective = Collective("all-reduce", 1_000_000, 1)
        return step(devices, batch_size, 1e6 * batch_size / devices, collective)

    monkeypatch.setattr(command, "compile_for", compile_for)
    flags = ["--config=mlp", "--config.batch_size=6", "--devices=2,4"]
    monkeypatch.setattr("sys.argv", ["scaling", *flags])
    command.main()
    said = capsys.readouterr().out
    strong, weak = said.split("## ")[1:3]
    assert "Refused: config.batch_size is 6, not for 4." in strong
    assert "Refused" not in weak
    assert "| 4 | 24 | 6 | 1 all-reduce of 1.00 MB | 1.50 MB | 0.006 G |" in weak
    for chip in CHIPS.values():  # what is assumed stands beside what follows from it
        assert page.render_assumptions(chip, "float32", 1 / 3) in said
    assert "Beyond 10000 devices the global batch is larger than the train set's 60,000 images." in said


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--chips=h10"], "--chips=h10: there is no such chip; the nearest is h100."),
        (["--bandwidth=1e9"], "--bandwidth needs --flops_per_sec beside it."),
        (["--flops_per_sec=1", "--bandwidth=0", "--latency=0"], "--bandwidth=0 must be a number above 0."),
        (["--utilisation=2"], "--utilisation=2 must be above 0"),
        (["--devices=1,x"], "'1,x' is no list of numbers"),
        (["--device=2"], "there is no flag --device"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, complaint, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling", "--config=mlp", *flags])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_measured_beside_predicted(run_scaling):
    said = run_scaling("--measure=1,2", "--measure_epochs=2", "--devices=1,2")
    rows = said.partition("## Measured")[2].splitlines()
    one, two = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row[:4] in ("| 1 ", "| 2 "))
    assert one[1] == one[5] == one[6]  # computed as measured, by construction
    assert one[2] == "0.00"
    assert float(two[2]) > 0  # gloo takes its time
    assert float(two[4]) > float(two[6]) / 2 * 0.9  # two processes have no more than two cores


@pytest.fixture
def run_scaling(capsys, monkeypatch):
    def run(*flags):
        sample = "--config.data.source=sample", "--config.batch_size=48", "--config.eval_batch_size=120"
        monkeypatch.setattr("sys.argv", ["scaling", "--config=mlp", *sample, *flags])
        command.main()
        return capsys.readouterr().out

    return run
