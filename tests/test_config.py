"""What a config is called, and what is said of one that cannot be used."""

import functools
import json
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from fmbench import config as config_lib
from fmbench.errors import UserError

# ml_collections loads config files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

_DEFINE_CONFIG_FILE = config_flags.DEFINE_config_file


@pytest.fixture
def parse(monkeypatch):
    """The config of a command line, parsed as `fmbench.main` does, given from within the repository."""
    monkeypatch.chdir(config_lib.REPOSITORY)

    def parse(*arguments: str):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        define = functools.partial(_DEFINE_CONFIG_FILE, flag_values=values)
        monkeypatch.setattr(config_flags, "DEFINE_config_file", define)
        monkeypatch.setattr(sys, "argv", ["fmbench.main", *arguments])
        config_lib.define_flags()
        config_lib.parse_flags(sys.argv)
        return config_lib.from_flags()

    return parse


@pytest.fixture
def config_file(tmp_path):
    """A file that is configs/mlp.py with further lines in `get_config`."""

    def write(*lines: str) -> str:
        body = "".join(f"    {line}\n" for line in ("config = base_config()", *lines, "return config"))
        path = tmp_path / "tests_mine.py"
        path.write_text(f"from fmbench.config import base_config\n\n\ndef get_config():\n{body}")
        return str(path)

    return write


# Names.


@pytest.mark.parametrize(
    ("arguments", "entry"),
    [
        (["--config=configs/mlp.py"], "mlp"),
        (["--config", "configs/mlp.py"], "mlp"),
        (["--config=configs/resnet.py:20"], "resnet-20"),
        (["--config=configs/resnet.py:20-paper"], "resnet-20-paper"),
        (["--config=configs/resnet.py:20", "--config.model.depth=32"], "resnet-20+model.depth=32"),
        (["--config=configs/vgg_like.py", "--config.num_epochs=2"], "vgg_like+num_epochs=2"),
        (["--config=configs/vgg_like.py", "--config.num_epochs=50"], "vgg_like"),  # its own value
        (["--config=configs/mlp.py", "--config.optimizer.learning_rate=1e-3"], "mlp"),
        (
            ["--config=configs/mlp.py", "--config.num_epochs=2", "--config.batch_size=100"],
            "mlp+batch_size=100+num_epochs=2",
        ),
        (["--config=configs/mlp.py", "--config.optimizer.nesterov"], "mlp+optimizer.nesterov=True"),
        # What makes no other entry.
        (["--config=configs/mlp.py", "--config.seed=7"], "mlp"),
        (["--config=configs/mlp.py", "--config.dtype=bfloat16"], "mlp"),
        (["--config=configs/mlp.py", "--config.data.dir=/elsewhere"], "mlp"),
        (
            ["--config=configs/mlp.py", "--config.entry=vgg_like", "--config.config_file=configs/vgg_like.py"],
            "mlp",
        ),
        # What does, though the arithmetic is the same.
        (["--config=configs/mlp.py", "--config.parallel=pmap"], "mlp+parallel=pmap"),
        (["--config=configs/mlp.py", "--config.data.source=sample"], "mlp+data.source=sample"),
    ],
)
def test_the_entry_is_the_file_its_argument_and_every_override(parse, arguments, entry):
    assert parse(*arguments).entry == entry


def test_an_entry_is_a_file_name(parse):
    entry = parse("--config=configs/resnet.py:20", "--config.schedule.boundaries=(0.1, 0.2)").entry
    assert entry == "resnet-20+schedule.boundaries=_0.1__0.2_"


def test_no_two_import_paths_make_one_entry(parse):
    names = ("a.b:C", "a.b_C", "a:b.C", "a_b:C", "a:b_C", "a_b_C", "a.b.C")
    entries = [parse("--config=configs/mlp.py", f"--config.model.name={name}").entry for name in names]
    assert entries[0] == "mlp+model.name=a.b-C"
    assert len(set(entries)) == len(names)


def test_data_need_not_be_proven_for_the_same_entry(parse):
    config = parse("--config=configs/mlp.py", "--config.data.source=idx", "--config.data.unproven=true")
    assert (config.entry, config.data.unproven) == ("mlp", True)


def test_a_record_from_before_a_field_came_has_its_default():
    recorded = config_lib.to_json(config_lib.load_file(str(config_lib.REPOSITORY / "configs" / "cnn1.py")))
    complete = config_lib.flatten(recorded)
    del (
        recorded["data"]["unproven"],
        recorded["augment"]["function"],
        recorded["stages"]["stage2"]["augment"]["function"],
    )
    assert config_lib.complete(recorded) == complete


def test_the_config_file_is_told_from_the_repository(parse, tmp_path, monkeypatch):
    assert parse("--config=configs/resnet.py:20").config_file == "configs/resnet.py"
    monkeypatch.chdir(tmp_path)
    spec = config_lib.REPOSITORY / "configs" / "mlp.py"
    assert config_lib.finalize(config_lib.load_file(str(spec)), str(spec)).config_file == "configs/mlp.py"


def test_a_finished_config_takes_no_new_fields(parse):
    with pytest.raises(AttributeError):
        parse("--config=configs/mlp.py").learning_rate = 1.0


@pytest.mark.parametrize("path", sorted((config_lib.REPOSITORY / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_usable_and_says_how_to_run_it(path):
    command, *_ = re.findall(rf"python -m fmbench.main --config=(configs/{path.name}\S*)", path.read_text())
    spec = str(config_lib.REPOSITORY / command)
    config = config_lib.finalize(config_lib.load_file(spec), spec)
    assert config.entry == path.stem + command.partition(".py")[2].replace(":", "-")


def test_stages_are_cut_to_the_epochs_of_the_run(make_config):
    def lengths(**overrides):
        stages = config_lib.stages(make_config("configs/cnn1.py", **overrides))
        assert [stage.augment["rotation"] for stage in stages] == [0, 8][: len(stages)]
        return [(stage.name, stage.num_epochs, stage.last_epoch) for stage in stages]

    assert lengths() == [("stage1", 10, 10), ("stage2", 50, 60)]
    assert lengths(num_epochs=13) == [("stage1", 10, 10), ("stage2", 3, 13)]
    assert lengths(num_epochs=10) == [("stage1", 10, 10)]
    assert lengths(num_epochs=5, stages__stage1__num_epochs=2) == [("stage1", 2, 2), ("stage2", 3, 5)]
    with pytest.raises(UserError, match=r"stages have 52 epochs; give --config\.num_epochs=52 too"):
        lengths(stages__stage1__num_epochs=2)


def test_a_config_without_stages_is_one_stage(make_config):
    config = make_config("configs/mlp.py", augment__flip=True)
    (stage,) = config_lib.stages(config)
    assert (stage.num_epochs, stage.last_epoch, stage.learning_rate) == (100, 100, 1e-3)
    assert stage.augment["flip"]


def test_a_config_elsewhere_does_not_pass_for_one_of_ours(tmp_path):
    copy = tmp_path / "mlp.py"
    copy.write_text((config_lib.REPOSITORY / "configs" / "mlp.py").read_text())
    with pytest.raises(UserError, match=r"has the name of configs/mlp\.py"):
        config_lib.finalize(config_lib.load_file(str(copy)), str(copy))


def test_a_resnet_without_a_depth_is_refused():
    with pytest.raises(UserError, match=r"configs/resnet\.py:20"):
        config_lib.load_file(str(config_lib.REPOSITORY / "configs" / "resnet.py"))


# What cannot be used.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["--config is missing", "--config=configs/mlp.py", "vgg_like.py"]),
        (["--config"], ["--config is missing"]),
        (["--config=configs/mpl.py"], ["no config file 'configs/mpl.py'", "cnn1.py", "mlp.py"]),
        (["--config=nowhere/mlp.py"], ["no config file 'nowhere/mlp.py'", "no configs"]),
        (["--config=configs"], ["no config file 'configs'"]),
        (["--config=pyproject.toml"], ["pyproject.toml", "not a Python file"]),
        (["--config=configs/resnet.py:twenty"], ["configs/resnet.py:twenty", "does not load", "'twenty'"]),
        (["--config=configs/mlp.py:20"], ["configs/mlp.py:20", "does not load"]),
        (["--config=configs/mlp.py", "--config.num_epoch=2"], ["no field 'num_epoch'", "num_epochs"]),
        (["--config=configs/mlp.py", "--config.learning_rate=2"], ["no field", "optimizer.learning_rate"]),
        (["--config=configs/mlp.py", "--config.model.depth=20"], ["no field 'model.depth'", "model.name"]),
        (["--config=configs/mlp.py", "--config.qqqqqqqq=1"], ["no field 'qqqqqqqq'", "seed"]),
        (["--config=configs/mlp.py", "--noconfig.optimizer.nesterof"], ["no field", "optimizer.nesterov"]),
        (["--config=configs/mlp.py", "--config.num_epochs=two"], ["config.num_epochs", "two"]),
        (["--config=configs/mlp.py", "--config.num_epochs=1.5"], ["config.num_epochs", "1.5"]),
        (["--config=configs/mlp.py", "--config.optimizer.nesterov=maybe"], ["config.optimizer.nesterov", "maybe"]),
        (["--config=configs/mlp.py", "--wrokdir=x"], ["wrokdir", "--help"]),
        (["--config=configs/mlp.py", "extra"], ["unexpected argument 'extra'"]),
        (
            ["--config=configs/cnn1.py", "--config.stages.stage2.augment.zoom=2"],
            ["stages.stage2.augment.zoom is 2"],
        ),
        (["--config=configs/cnn1.py", "--config.stages.stage2.learning_rate=-1"], ["stage2.learning_rate is -1"]),
        (["--config=configs/cnn1.py", "--config.stages.stage3.num_epochs=1"], ["no field 'stages.stage3"]),
        (["--config=configs/cnn1.py", "--config.augment.flip"], ["runs without stages"]),
        (["--config=configs/mlp.py", "--config.augment.mixup=-1"], ["config.augment.mixup is -1"]),
        (["--config=configs/mlp.py", "--config.batch_size=0"], ["config.batch_size is 0", "at least 1"]),
        (["--config=configs/mlp.py", "--config.eval_batch_size=-1"], ["config.eval_batch_size is -1"]),
        (["--config=configs/mlp.py", "--config.num_epochs=0"], ["config.num_epochs is 0"]),
        (["--config=configs/mlp.py", "--config.seed=-1"], ["config.seed is -1"]),
        (["--config=configs/mlp.py", "--config.seed=4294967296"], ["config.seed is 4294967296", "2**32"]),
        (["--config=configs/mlp.py", "--config.optimizer.learning_rate=-1"], ["learning_rate is -1"]),
        (["--config=configs/mlp.py", "--config.optimizer.learning_rate=nan"], ["learning_rate is nan"]),
        (["--config=configs/mlp.py", "--config.label_smoothing=1"], ["label_smoothing is 1", "below 1"]),
        (["--config=configs/mlp.py", "--config.ema_decay=1"], ["ema_decay is 1", "below 1"]),
        (["--config=configs/mlp.py", "--config.ema_decay=-0.1"], ["ema_decay is -0.1", "at least 0"]),
        (["--config=configs/mlp.py", "--config.dtype=float16"], ["config.dtype is 'float16'", "bfloat16"]),
        (["--config=configs/mlp.py", "--config.parallel=ddp"], ["config.parallel is 'ddp'", "jit, pmap"]),
        (["--config=configs/mlp.py", "--config.watch=train"], ["config.watch is 'train'", "validation"]),
        (["--config=configs/mlp.py", "--config.data.normalization=z"], ["data.normalization is 'z'", "unit"]),
        (["--config=configs/mlp.py", "--config.early_stopping_patience=2"], ["early_stopping_patience", "watch"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_clear_message(parse, arguments, said):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    for words in said:
        assert words in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.num_epochs = 'two'", "TypeError"),
        ("config.lerning_rate = oops", "NameError: name 'oops'"),
        ("config.schedule.boundaries = [0.5", "SyntaxError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
    ],
)
def test_a_broken_config_file_is_named_with_its_error(parse, config_file, line, said):
    spec = config_file(line)
    with pytest.raises(UserError) as error:
        parse(f"--config={spec}")
    assert f"config '{spec}' does not load: " in str(error.value)
    assert said in str(error.value)


def test_a_config_file_without_get_config_is_named(parse, tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py' does not load: .*get_config"):
        parse(f"--config={tmp_path / 'empty.py'}")


@pytest.mark.parametrize("line", ["return None", "return {'num_epochs': 1}", "return type(config)()"])
def test_a_config_file_that_gives_no_config_is_named(parse, config_file, line):
    with pytest.raises(UserError, match=r"tests_mine\.py"):
        parse(f"--config={config_file(line)}")


def test_a_config_file_may_add_arguments_of_its_model(parse, config_file):
    assert parse(f"--config={config_file('config.model.width = 3')}").model.width == 3


# Plain data.


def test_flatten():
    assert config_lib.flatten({"b": {"d": {"e": 1}, "c": 2}, "a": ()}) == {"a": (), "b.c": 2, "b.d.e": 1}


def test_to_json_is_what_json_gives_back():
    config = config_lib.to_json(config_lib.base_config())
    assert config == json.loads(json.dumps(config))
    assert config["schedule"]["boundaries"] == [0.5, 0.75]
    assert config["data"]["dir"] is None


def test_difference_names_what_changed_came_and_went():
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}
    new = {"a": 1, "b": {"c": 5, "f": 6}, "e": 4}
    assert config_lib.difference(old, new) == "b.c: 2 -> 5, b.d: 3 -> absent, b.f: absent -> 6"
    assert config_lib.difference(old, old) == ""
