"""What a config is called, and what is said of one that cannot be used."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fmbench import config as config_lib
from fmbench import entries
from fmbench.errors import UserError


@pytest.fixture
def parse(monkeypatch):
    """The config of a command line, given from within the repository."""
    monkeypatch.chdir(config_lib.REPOSITORY)

    def parse(*arguments: str):
        return entries.from_arguments(arguments)

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
    recorded = config_lib.to_json(entries.load(str(config_lib.REPOSITORY / "configs" / "cnn1.py")))
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
    assert entries.resolve(str(spec), {}).config_file == "configs/mlp.py"


def test_a_finished_config_takes_no_new_fields(parse):
    with pytest.raises(AttributeError):
        parse("--config=configs/mlp.py").learning_rate = 1.0


@pytest.mark.parametrize("path", sorted((config_lib.REPOSITORY / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_usable_and_says_how_to_run_it(path):
    command, *_ = re.findall(rf"python -m fmbench.main --config=(configs/{path.name}\S*)", path.read_text())
    spec = str(config_lib.REPOSITORY / command)
    config = entries.resolve(spec, {})
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


# Seeds by rule.


def seeds(*arguments: str, number: int = 5) -> list[int]:
    return entries.seeds_of(config_lib.to_json(entries.from_arguments(arguments)), number)


def test_seeds_are_the_first_bytes_of_numbered_hashes():
    """printf '{"num_epochs": 3} 0' | sha256sum begins with ea03; with 1 and 2 for the number 30fc and 1925."""
    recipe = config_lib.to_json(config_lib.base_config()) | {"num_epochs": 3}
    assert entries.seeds_of(recipe, 3) == [0xEA03, 0x30FC, 0x1925]
    assert entries.seeds_of({"num_epochs": 3}, 3) == [0xEA03, 0x30FC, 0x1925]  # before the other fields came


def test_seeds_are_distinct_and_more_begin_with_the_fewer():
    many = seeds("--config=speedrun:94", number=2000)  # some 30 candidates come twice
    assert len(set(many)) == 2000
    assert all(0 <= seed < 2**16 for seed in many)
    assert seeds("--config=speedrun:94") == many[:5]


@pytest.mark.parametrize(
    ("flag", "changes_them"),
    [
        ("seed=7", False),
        ("dtype=bfloat16", False),
        ("data.dir=elsewhere", False),
        ("data.source=csv", False),
        ("num_epochs=7", True),
        ("optimizer.learning_rate=0.171", True),
        ("data.source=sample", True),
    ],
)
def test_another_recipe_has_other_seeds(flag, changes_them):
    assert (seeds("--config=speedrun:94", f"--config.{flag}") != seeds("--config=speedrun:94")) == changes_them


def test_stages_are_part_of_the_recipe():
    recipe = config_lib.to_json(entries.from_arguments(["--config=cnn1"]))
    changed = json.loads(json.dumps(recipe))
    changed["stages"]["stage2"]["augment"]["zoom"] = 0.09
    assert entries.seeds_of(changed, 5) != entries.seeds_of(recipe, 5)


@pytest.mark.parametrize("function", ["base_config", "stage"])
def test_a_field_that_comes_later_changes_no_seeds(monkeypatch, function):
    recipe = config_lib.to_json(entries.from_arguments(["--config=cnn1"]))
    before = entries.seeds_of(recipe, 5)
    original = getattr(config_lib, function)

    def later(*arguments, **fields):
        config = original(*arguments, **fields)
        config.new_field = 0.5
        return config

    monkeypatch.setattr(config_lib, function, later)
    assert entries.seeds_of(recipe, 5) == before
    assert seeds("--config=cnn1") == before


# Names that are published.


def copy_of(name: str, path: Path, old: str = "", new: str = "") -> str:
    """A copy of a shipped config file, edited by hand."""
    text = (entries.CONFIGS / f"{name}.py").read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text)
    return str(path)


def test_an_equal_copy_of_a_shipped_config_is_that_config(tmp_path):
    config = entries.resolve(copy_of("mlp", tmp_path / "mlp.py"), {})
    assert (config.entry, config.config_file) == ("mlp", "configs/mlp.py")


@pytest.mark.parametrize(
    ("file", "argument", "entry"),
    [
        ("mlp.py", "", "mlp+num_epochs=3"),
        ("mlp.py", ":best", "mlp-best+num_epochs=3"),
        ("mlp-best.py", "", None),  # the file's default is no `best`
        ("mine.py", "", "mine"),
        ("mlp-mine.py", "", "mlp-mine"),  # there is no such argument
        ("mlp+num_epochs=2.py", "", "mlp_num_epochs=2"),  # would pass for an overridden mlp
    ],
)
def test_an_edited_copy_never_has_the_name_of_the_published_config(tmp_path, file, argument, entry):
    spec = copy_of("mlp", tmp_path / file, "config.num_epochs = 100", "config.num_epochs = 3")
    found = entries.resolve(f"{spec}{argument}", {}).entry
    assert found == entry if entry else found.startswith("mlp-best+")


def test_what_an_edited_copy_changes_and_what_a_flag_changes_have_one_name(tmp_path):
    spec = copy_of("mlp", tmp_path / "mlp.py", "config.num_epochs = 100", "config.num_epochs = 3")
    edited, flagged = entries.resolve(spec, {}), entries.resolve("mlp", {"num_epochs": 3})
    assert edited == flagged
    assert entries.resolve(spec, {"num_epochs": 100}) == entries.resolve("mlp", {})


def test_added_and_removed_fields_are_changes(tmp_path):
    added = copy_of("cnn2", tmp_path / "cnn2.py", '"cnn2"', '"mlp"\n    config.model.width = 3')
    assert entries.resolve(added, {}).entry == "cnn2+model.name=mlp+model.width=3"
    removed = copy_of("tiny", tmp_path / "tiny.py", "config.model.widths = WIDTHS[arg]", "WIDTHS[arg]")
    assert entries.resolve(f"{removed}:20k", {}).entry == "tiny-20k+model.widths=absent"


def test_many_changes_make_a_name_that_a_file_can_have_and_other_changes_another(tmp_path):
    def entry(**widths):
        return entries.resolve("resnet:20", {"schedule.boundaries": tuple(range(60)), **widths}).entry

    assert re.fullmatch(r"resnet-20\+1_changes=[0-9a-f]{8}", entry())
    assert re.fullmatch(r"resnet-20\+2_changes=[0-9a-f]{8}", entry(num_epochs=2))
    assert entry(num_epochs=2) != entry(num_epochs=3)


# Finding a config.


@pytest.mark.parametrize("spec", ["speedrun:94", "configs/speedrun.py:94", "configs/speedrun:94"])
def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    place = entries.find(spec)
    assert (place.path, place.argument) == (entries.CONFIGS / "speedrun.py", "94")
    config = entries.resolve(spec, {})
    assert (config.entry, config.config_file) == ("speedrun-94", "configs/speedrun.py")


def test_a_file_that_is_there_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    copy_of("mlp", tmp_path / "configs" / "mlp.py")
    assert entries.find("configs/mlp.py").path == Path("configs/mlp.py")
    assert entries.find("mlp").path == entries.CONFIGS / "mlp.py"


@pytest.mark.parametrize("folder", ["a:b", "a.py:b", ":", "x: y"])
def test_folders_and_files_may_have_colons_in_their_names(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    path = copy_of("mlp", tmp_path / folder / "mine.py")
    assert entries.find(path) == (Path(path), "")
    assert entries.find(f"{path}:best") == (Path(path), "best")
    shutil.copy(path, f"{path}:best.py")
    assert entries.find(f"{path}:best.py") == (Path(f"{path}:best.py"), "")  # the longest that is there
    monkeypatch.chdir(tmp_path)
    assert entries.find(f"{folder}/mine.py:best") == (Path(folder) / "mine.py", "best")


@pytest.mark.parametrize("name", [".py", " .py", "-.py", "_.py", "...py", "+.py"])
def test_a_file_that_gives_no_name_is_refused(tmp_path, name):
    path = copy_of("mlp", tmp_path / name)
    with pytest.raises(UserError, match="gives its entry no name"):
        entries.resolve(path, {})


def test_an_edited_config_is_read_anew(tmp_path):
    # A cached bytecode file of the same second and size would hide the edit.
    for num_epochs in (3, 4):
        spec = copy_of("mlp", tmp_path / "mine.py", "num_epochs = 100", f"num_epochs = {num_epochs}")
        assert entries.load(spec).num_epochs == num_epochs
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_every_listed_spec_is_an_entry_of_its_own():
    specs = entries.specs()
    assert {"mlp", "mlp:best", "speedrun:94", "resnet:20-paper", "fc:b", "transfer:vgg19-bug"} <= set(specs)
    found = [entries.resolve(spec, {}).entry for spec in specs]
    assert found == [spec.replace(":", "-") for spec in specs]


def test_other_depths_than_the_listed_do_as_well():
    assert entries.resolve("resnet:26", {}).model.depth == 26


# Fields.


def test_every_field_has_a_meaning_and_its_default_is_shown():
    shown = {field.key: field for field in config_lib.fields()}
    defaults = config_lib.flatten(config_lib.base_config().to_dict())
    assert defaults.keys() <= shown.keys()
    for key, default in defaults.items():
        assert shown[key].meaning
        assert eval(shown[key].default) == default
    assert {"stages.<name>.num_epochs", "stages.<name>.learning_rate"} <= shown.keys()


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("num_epochs", "3", 3),
        ("num_epochs", 3, 3),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", 1, 1.0),
        ("optimizer.nesterov", "true", True),
        ("optimizer.nesterov", "False", False),
        ("optimizer.nesterov", True, True),
        ("data.dir", "/somewhere", "/somewhere"),
        ("data.dir", Path("/somewhere"), "/somewhere"),
        ("data.dir", None, None),
        ("schedule.boundaries", "(0.25,)", (0.25,)),
        ("schedule.boundaries", "0.25", (0.25,)),
        ("schedule.boundaries", "[0.25, 0.5]", (0.25, 0.5)),
        ("schedule.boundaries", [0.25], (0.25,)),
    ],
)
def test_a_field_is_set_by_text_or_value(key, given, value):
    found = config_lib.flatten(entries.resolve("mlp", {key: given}).to_dict())[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("num_epochs", "x", "config.num_epochs is 'x'; it must be a whole number."),
        ("num_epochs", 1.5, "config.num_epochs is '1.5'; it must be a whole number."),
        ("num_epochs", True, "config.num_epochs is 'True'; it must be a whole number."),
        ("num_epochs", None, "config.num_epochs is 'None'; it must be a whole number."),
        ("optimizer.learning_rate", "x", "config.optimizer.learning_rate is 'x'; it must be a number."),
        ("optimizer.nesterov", "x", "config.optimizer.nesterov is 'x'; it must be true or false."),
        ("schedule.boundaries", "(1", "config.schedule.boundaries is '(1'; it must be a list like (0.5, 0.75)."),
        ("watch", 3, "config.watch is '3'; it must be text."),
        ("optimizer", "adam", "config has no field 'optimizer'"),
        ("optimizer.name.x", "adam", "config has no field 'optimizer.name.x'; the nearest"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_plain_words(key, given, said):
    with pytest.raises(UserError) as error:
        entries.resolve("mlp", {key: given})
    assert str(error.value).startswith(said)


# What cannot be used.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["--config is missing", "--config=mlp", "vgg_like"]),
        (["--config"], ["--config is missing"]),
        (["--config=configs/mpl.py"], ["no config 'configs/mpl.py'", "the nearest are configs/mlp.py"]),
        (["--config=mpl"], ["no config 'mpl'; the nearest is mlp."]),
        (["--config=qqqq"], ["no config 'qqqq'; there are baseline, "]),
        (["--config=nowhere/mlp.py"], ["no config 'nowhere/mlp.py'; the nearest is mlp"]),
        (["--config=configs"], ["no config 'configs'"]),
        (["--config="], ["--config is missing"]),
        (["--config=:"], ["--config is missing"]),
        (["--config=speedrun:97"], ["no argument '97'; there are 93, 94, 95, 94-gpu, 96"]),
        (["--config=speedrun"], ["needs an argument, as in speedrun:93; there are 93, 94, 95, 94-gpu, 96"]),
        (["--config=mlp:bst"], ["no argument 'bst'", "the nearest is best"]),
        (["--config=cnn1:9"], ["cnn1 takes no argument"]),
        (["--config=resnet"], ["needs an argument, as in resnet:20"]),
        (["--config=pyproject.toml"], ["pyproject.toml", "not a Python file"]),
        (
            ["--config=configs/resnet.py:twenty"],
            ["no argument 'twenty'; there are 20, 32"],
        ),
        (["--config=configs/mlp.py:20"], ["no argument '20'; there are best"]),
        (["--config=configs/mlp.py", "--config.num_epoch=2"], ["no field 'num_epoch'", "num_epochs"]),
        (["--config=configs/mlp.py", "--config.learning_rate=2"], ["no field", "optimizer.learning_rate"]),
        (["--config=configs/mlp.py", "--config.model.depth=20"], ["no field 'model.depth'", "model.name"]),
        (["--config=configs/mlp.py", "--config.qqqqqqqq=1"], ["no field 'qqqqqqqq'", "seed"]),
        (["--config=configs/mlp.py", "--noconfig.optimizer.nesterof"], ["no field", "optimizer.nesterov"]),
        (["--config=configs/mlp.py", "--config.num_epochs=two"], ["config.num_epochs", "two"]),
        (["--config=configs/mlp.py", "--config.num_epochs=1.5"], ["config.num_epochs", "1.5"]),
        (["--config=configs/mlp.py", "--config.optimizer.nesterov=maybe"], ["config.optimizer.nesterov", "maybe"]),
        (["--config=configs/mlp.py", "--wrokdir=x"], ["wrokdir", "--help"]),
        (["--config=mlp", "--config.seed"], ["config.seed is 'true'; it must be a whole number"]),
        (["--config=mlp", "--config.optimizer.name=adm"], ["optimizer.name is 'adm'", "nearest are adam, adamw"]),
        (["--config=mlp", "--config.schedule.name=cosin"], ["schedule.name is 'cosin'", "nearest is cosine"]),
        (["--config=mlp", "--config.data.split=al"], ["data.split is 'al'", "train_test_split", "the nearest"]),
        (["--config=mlp", "--config.data.source=cvs"], ["data.source is 'cvs'", "the nearest is csv"]),
        (["--config=mlp", "--config.dtype=flaot32"], ["dtype is 'flaot32'", "the nearest are float32"]),
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
    with pytest.raises(UserError, match=r"empty\.py' does not load: it has no function get_config"):
        parse(f"--config={tmp_path / 'empty.py'}")


@pytest.mark.parametrize("line", ["return None", "return {'num_epochs': 1}", "return type(config)()"])
def test_a_config_file_that_gives_no_config_is_named(parse, config_file, line):
    with pytest.raises(UserError, match=r"tests_mine\.py"):
        parse(f"--config={config_file(line)}")


@pytest.mark.parametrize("group", ["model", "optimizer", "schedule"])
def test_a_config_file_may_add_arguments_of_what_is_its_own(parse, config_file, group):
    assert parse(f"--config={config_file(f'config.{group}.width = 3')}")[group].width == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.data.flod = 1", "there is no config.data.flod; the nearest is fold."),
        (
            "config.optimizer.rates = {'head': 1.0}",
            "config.optimizer.rates is {'head': 1.0}; it must be a plain value.",
        ),
        (
            "config.model.activation = abs",
            "a field of the config: Object of type builtin",
        ),
    ],
)
def test_what_no_record_could_hold_is_refused_before_anything_is_trained(parse, config_file, line, said):
    with pytest.raises(UserError) as error:
        parse(f"--config={config_file(line)}")
    assert said in str(error.value)


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
