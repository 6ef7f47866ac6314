"""The experiment file: what YAML gets wrong, layers and overrides, the delta, and the way through experiment.yaml."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc import units, yamlfile
from hpc.errors import UserError
from hpc.experiment import Experiment, load, validate

PLAIN = "name: plain\nmodel: {name: resnet3d}\ndata: {file: scans.h5}\n"


def write(folder: Path, text: str, name: str = "exp.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read(folder: Path, text: str, *overrides: str) -> Experiment:
    return load(write(folder, text), list(overrides))[0]


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", ".1e-2", "0.001", "+1e-3"])
def test_a_learning_rate_is_a_number_however_it_is_written(written: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"{PLAIN}train: {{optimizer: {{lr: {written}}}}}").train.optimizer.lr == 0.001
    assert read(tmp_path, PLAIN, f"train.optimizer.lr={written}").train.optimizer.lr == 0.001
    assert read(tmp_path, PLAIN, f"model.rate={written}").model.options == {"rate": 0.001}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds list, not 'key: value' lines"),
        ("just words", "holds str"),
        (PLAIN + "name: again\n", "line 4: 'name' stands twice"),
        ("name: a\nmodel: {name: m, depth: 1, depth: 2}\n", "line 2: 'depth' stands twice"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases are not read; share settings with 'base:'"),
        (PLAIN + "x: [1, 2\n", "line 5:"),
        (PLAIN + "---\nname: b\n", "line 4: but found another document"),
        (PLAIN + "x: !!python/object/apply:os.system [id]\n", "line 4: could not determine a constructor"),
        (PLAIN + "x: \x01\n", "special characters are not allowed"),
        (PLAIN + "mail: 2024-13-45\n", "month must be in 1..12; put quotes around text"),
        (PLAIN + "x: " + "[" * 4000, "nested too deep"),
        (PLAIN + "x: " + "9" * 5000, "exp.yaml: Exceeds the limit"),
        (PLAIN + "? [1, 2]\n: x\n", "line 4: [1, 2] is no name for a key"),
        (PLAIN + "off: x\n", "line 4: False is no name for a key; put quotes around"),
        (PLAIN + "#" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, text)
    assert words in said and "exp.yaml" in said and "\n" not in said


def test_an_alias_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    assert "line 2: aliases" in refusal(tmp_path, bomb)


def test_a_binary_file_a_missing_one_and_a_folder_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x89HDF\r\n\x1a\n\xff\xfe")
    for path, words in ((binary, "cannot be read"), (tmp_path / "no.yaml", "no such file"), (tmp_path, "cannot be")):
        with pytest.raises(UserError, match=words):
            load(path)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "trian: {epochs: 3}",
            "trian: no such key; did you mean 'train'? valid: data, launch, model, name, task, train",
        ),
        ("train: {epoch: 3}", "train.epoch: no such key; did you mean 'epochs'?"),
        ("train: {optimizer: {lrr: 1}}", "train.optimizer.lrr: no such key; did you mean 'lr'?"),
        ("launch: {gpu: 1}", "launch.gpu: no such key; did you mean 'gpus'"),
        ("1: x", "1: Keys should be strings"),
        ("train: 7", "train: is a section, 'key: value' lines (got 7)"),
        ("train: {epochs: many}", "train.epochs: Input should be a valid integer"),
        ("train: {epochs: 2.5}", "train.epochs: Input should be a valid integer"),
        ("train: {epochs: 0}", "train.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("train: {epochs: yes}", "train.epochs: is no place for true or false"),
        ("train: {seed: -1}", "train.seed: Input should be greater than or equal to 0 (got -1)"),
        ("train: {optimizer: {lr: .inf}}", "train.optimizer.lr: Input should be a finite number"),
        ("train: {optimizer: {lr: .nan}}", "train.optimizer.lr: Input should be"),
        ("train: {optimizer: {lr: 0}}", "train.optimizer.lr: Input should be greater than 0"),
        (
            "train: {precision: fp8}",
            "train.precision: Input should be 'fp32', 'tf32', 'bf16', 'fp16' or 'auto' (got 'fp8')",
        ),
        (
            "train: {loss: {class_weights: some}}",
            "train.loss.class_weights: Input should be 'balanced' or a list (got 'some')",
        ),
        ("train: {stages: {epochs: 2}}", "train.stages: is a list, [one, two]"),
        ("train: {optimizer: {betas: 0.9}}", "train.optimizer.betas: is a list, [one, two] (got 0.9)"),
        ("train: {stages: [{epochs: 1, freeze: [1]}]}", "train.stages.0.freeze.0: Input should be a valid string"),
        ("launch: {time: soon}", "launch.time: 'soon' is not a duration; write 90s, 5min"),
        ("launch: {time: .inf}", "launch.time: inf is not a duration above zero"),
        ("launch: {mem: lots}", "launch.mem: 'lots' is not a size"),
        ("launch: {mem: 0.0001}", "launch.mem: 0.0001 is not a size of 1 MB or more"),
        ("train: {optimizer: {betas: [1.5, 2]}}", "train.optimizer.betas.0: Input should be less than 1 (got 1.5)"),
        ("train: {optimizer: {betas: [0.9, 1]}}", "train.optimizer.betas.1: Input should be less than 1 (got 1)"),
        ("train: {optimizer: {betas: [-0.1, 0.9]}}", "betas.0: Input should be greater than or equal to 0"),
        ("train: {loss: {class_weights: [1, -1]}}", "class_weights: [1.0, -1.0] are no weights: finite numbers of 0"),
        ("train: {loss: {class_weights: [0, 0.0]}}", "class_weights: [0.0, 0.0] are no weights"),
        ("train: {loss: {class_weights: []}}", "class_weights: [] are no weights"),
        ("train: {loss: {class_weights: [1, .inf]}}", "class_weights.1: Input should be a finite number"),
        ("train: {loss: {class_weights: [1, .nan]}}", "class_weights.1: Input should be a finite number"),
        ("task: regression", "task: Input should be 'classification', 'multilabel' or 'segmentation'"),
        ("train: {loss: {name: mse}}", "train.loss.name: Input should be 'cross_entropy'"),
        ("train: {loss: {name: bce}}", "train.loss.name bce is no loss of task classification; use cross_entropy, f"),
        ("train: {loss: {gamma: 3}}", "train.loss.gamma has no effect with cross_entropy of task classification; it"),
        ("task: multilabel\ntrain: {loss: {class_weights: balanced}}", "it belongs to task classification, task seg"),
        ("task: multilabel\ntrain: {loss: {name: focal, alpha: 1}}", "train.loss.alpha: Input should be less than 1"),
        ("train: {monitor: acuracy}", "train.monitor acuracy is no metric of task classification; did you mean 'acc"),
        ("task: multilabel\ntrain: {monitor: accuracy}", "train.monitor accuracy is no metric of task multilabel; "),
        ("task: segmentation\ntrain: {monitor: map}", "valid: accuracy, dice, iou, loss"),
        ("train: {accumulate: 3}", "data.batch_size 8 does not divide by train.accumulate 3"),
    ],
)
def test_a_fault_names_its_key_the_value_and_the_good_ones(lines: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, f"{PLAIN}{lines}\n")


@pytest.mark.parametrize(
    "train",
    ["{loss: {class_weights: some}}", "{loss: {class_weights: [1, .nan]}}", "{stages: [{epochs: 1, freeze: [1]}]}"],
)
def test_what_is_a_word_or_a_list_has_one_line_for_one_fault(train: str, tmp_path: Path) -> None:
    assert len(refusal(tmp_path, f"{PLAIN}train: {train}\n").splitlines()) == 1


@pytest.mark.parametrize(
    ("task", "loss", "monitor"),
    [
        ("classification", "cross_entropy", "accuracy"),
        ("multilabel", "bce", "map"),
        ("segmentation", "dice_ce", "dice"),
    ],
)
def test_loss_and_monitor_follow_the_task(task: str, loss: str, monitor: str, tmp_path: Path) -> None:
    experiment = read(tmp_path, f"{PLAIN}task: {task}\n")
    assert (experiment.train.loss.of_task(task), experiment.monitor) == (loss, monitor)
    assert read(tmp_path, f"{PLAIN}task: {task}\n", "train.monitor=loss").monitor == "loss"


@pytest.mark.parametrize("name", ["", ".hidden", "-rf", "a/b", "a b", "a\nb", "ä", "x" * 81])
def test_a_name_that_no_folder_should_have_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="name: must be 1 to 80 letters"):
        validate({"name": name, "model": {"name": "m"}, "data": {"file": "x"}}, "here")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, "model: {}\ndata: {file: x, thread: 2}\n")
    assert [line.split(": ")[1] for line in said.splitlines()] == ["name", "model.name", "data.thread"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("optimizer: {name: adamw, momentum: 0.5}", "momentum has no effect with adamw; it belongs to sgd"),
        ("optimizer: {name: sgd, betas: [0.8, 0.9]}", "betas has no effect with sgd; it belongs to adam, adamw"),
        ("scheduler: {gamma: 0.8}", "gamma has no effect with constant; it belongs to exponential"),
        ("scheduler: {name: exponential, final: 0.1}", "final has no effect with exponential"),
        ("scheduler: {name: one_cycle, warmup_epochs: 1}", "warmup_epochs has no effect with one_cycle"),
        (
            "epochs: 5, scheduler: {name: cosine, warmup_epochs: 5}",
            "train: scheduler.warmup_epochs 5 is no shorter than the 5 epochs that it begins; use less than 5",
        ),
        ("epochs: 5, scheduler: {name: step, milestones: [2, 5]}", "milestones [2, 5] go past the end of 5 epochs"),
        ("epochs: 5, scheduler: {name: step, step_size: 5}", "step_size 5 has no effect in 5 epochs; use 1 to 4"),
        ("epochs: 1, scheduler: {name: step, step_size: 1}", "no effect in 1 epochs; leave it out, or train for more"),
        (
            "stages: [{epochs: 9}, {epochs: 2, scheduler: {name: step, milestones: [3]}}]",
            "train: stages.1.scheduler.milestones [3] go past the end of 2 epochs; use 1 to 1",
        ),
        (
            "scheduler: {name: cosine, warmup_epochs: 2}, stages: [{epochs: 9}, {epochs: 2}]",
            "no shorter than the 2 epochs that it begins; use less than 2, or more epochs (of stages.1: give it",
        ),
        ("monitor: ''", "train.monitor '' is no metric of task classification; use accuracy, balanced_accuracy, "),
    ],
)
def test_an_option_without_effect_is_refused(lines: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, f"{PLAIN}train: {{{lines}}}\n")


def test_a_schedule_that_ends_in_time_is_taken(tmp_path: Path) -> None:
    for lines in (
        "epochs: 5, scheduler: {name: cosine, warmup_epochs: 4.5}",
        "epochs: 5, scheduler: {name: step, milestones: [1, 4]}",
        "epochs: 5, scheduler: {name: step, step_size: 4}",
        "scheduler: {name: cosine, warmup_epochs: 2}, stages: [{epochs: 9}, {epochs: 2, scheduler: {name: constant}}]",
    ):
        assert read(tmp_path, f"{PLAIN}train: {{{lines}}}\n")


def test_stages_over_a_base_with_epochs_tell_how_to_take_them_back(tmp_path: Path) -> None:
    write(tmp_path, f"{PLAIN}train: {{epochs: 5}}", "low.yaml")
    top = write(tmp_path, "base: low.yaml\ntrain: {stages: [{epochs: 2}, {epochs: 4}]}", "top.yaml")
    with pytest.raises(UserError, match=r"epochs 5 is not the sum of the stages' \(6\).* train\.epochs=null") as caught:
        load(top)
    assert "\n" not in str(caught.value)
    assert load(top, ["train.epochs=null"])[0].train.epochs == 6


def test_layers_come_from_the_base_up_and_paths_belong_to_the_file_that_spells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f"{PLAIN}train: {{epochs: 5, seed: 3}}", "bases/low.yaml")
    write(tmp_path, "base: bases/low.yaml\ntrain: {epochs: 6}", "middle.yaml")
    top = write(tmp_path, "base: ../middle.yaml\nname: top\nlaunch: {mem: 2GB}", "own/top.yaml")
    experiment, delta = load(top)
    assert (experiment.train.epochs, experiment.train.seed) == (6, 3)
    assert experiment.data.file == str(tmp_path / "bases" / "scans.h5")
    assert delta == {"name": "top", "launch.mem": 2.0}

    monkeypatch.chdir(tmp_path)
    experiment, delta = load(top, ["data.file=new/scans.h5"])
    assert experiment.data.file == str(tmp_path / "new" / "scans.h5")
    assert set(delta) == {"name", "launch.mem", "data.file"}
    model = load(top, ["model.name=file:nets/mine.py:Net"])[0].model.name
    assert model == f"file:{tmp_path}/nets/mine.py:Net"


def test_a_base_may_be_a_fragment(tmp_path: Path) -> None:
    write(tmp_path, "launch: {instance: cedia-a100-40gb, time: 2h}", "site.yaml")
    experiment, delta = load(write(tmp_path, f"base: site.yaml\n{PLAIN}launch: {{time: 3h}}"))
    assert (experiment.launch.instance, experiment.launch.time) == ("cedia-a100-40gb", 10800)
    assert delta["name"] == "plain" and delta["launch.time"] == 10800


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("base: exp.yaml", "base: goes in a circle: exp.yaml -> exp.yaml"),
        ("base: other.yaml", "goes in a circle: exp.yaml -> other.yaml -> exp.yaml"),
        ("base: away.yaml", "away.yaml: no such file"),
        ("base: 3", "base: must be a recipe or the path of another experiment (got 3)"),
        ("base: ~nobody-here/x.yaml", "is not a path"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(base: str, words: str, tmp_path: Path) -> None:
    write(tmp_path, "base: exp.yaml", "other.yaml")
    assert words in refusal(tmp_path, f"{PLAIN}{base}\n")


@pytest.mark.parametrize("file", ["~nobody-here/x.h5", '"a\\0b"'])
def test_a_data_file_that_is_no_path_is_refused(file: str, tmp_path: Path) -> None:
    assert "is not a path" in refusal(tmp_path, f"name: a\nmodel: {{name: m}}\ndata: {{file: {file}}}\n")


@pytest.mark.parametrize("section", ["train:\n", "train: null\n", "train: {epochs: null}\n", "train: {optimizer: }\n"])
def test_null_is_the_default_in_the_file(section: str, tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN + section) == read(tmp_path, PLAIN)


@pytest.mark.parametrize("override", ["train=", "train.epochs=null", "train.optimizer=~", "train.optimizer.lr="])
def test_a_null_override_takes_a_key_back_to_its_default(override: str, tmp_path: Path) -> None:
    plain = read(tmp_path, PLAIN)
    assert read(tmp_path, PLAIN, override) == plain, "a key that nobody had set"
    values: dict[str, Any] = {"train": {"epochs": 77, "optimizer": {"lr": 0.5}}}
    expected = {"train": {"train": {}}, "train.epochs": {"train": {"optimizer": {"lr": 0.5}}}}
    left = expected.get(override.partition("=")[0], {"train": {"epochs": 77}})
    given = read(tmp_path, PLAIN + yamlfile.dump(values), override)
    assert given == read(tmp_path, PLAIN + yamlfile.dump(left))


def test_overrides_replace_scalars_and_merge_sections(tmp_path: Path) -> None:
    text = f"{PLAIN}train: {{epochs: 5, optimizer: {{name: sgd, momentum: 0.8}}}}\n"
    experiment = read(tmp_path, text, "train.optimizer.lr=0.1", "train={seed: 4}", "train.loss.class_weights=[1, 2]")
    train = experiment.train
    assert (train.epochs, train.seed, train.optimizer.momentum, train.optimizer.lr) == (5, 4, 0.8, 0.1)
    assert train.loss.class_weights == [1, 2]


@pytest.mark.parametrize("override", ["epochs", "train..epochs=3", "=3", "train.epochs:3", "--epochs=3"])
def test_what_is_no_override_is_refused(override: str, tmp_path: Path) -> None:
    assert "is no override; write train.epochs=20" in refusal(tmp_path, PLAIN, override)


def test_another_model_drops_the_old_ones_options_but_not_those_given_with_it(tmp_path: Path) -> None:
    text = PLAIN.replace("resnet3d", "resnet3d, stem_stride: 2, num_classes: 3")
    path = write(tmp_path, text)
    experiment, delta = load(path, ["model.depth=4", "model.name=transformer3d"])
    assert experiment.model.options == {"depth": 4} and experiment.model.num_classes is None
    assert delta == {"model.name": "transformer3d", "model.depth": 4, "model.num_classes": None}
    same, _ = load(path, ["model.name=resnet3d", "model.depth=4"])
    assert same.model.options == {"depth": 4, "stem_stride": 2}


@pytest.mark.parametrize(("name", "kept"), [("timm:resnet50", True), ("resnet3d", False)])
def test_another_model_starts_from_its_own_weights_where_the_old_one_did(tmp_path: Path, name: str, kept: bool) -> None:
    path = write(tmp_path, PLAIN.replace("resnet3d", '"timm:efficientnet_b4", pretrained: true, drop_rate: 0.2'))
    model = load(path, [f"model.name={name}"])[0].model
    assert model.pretrained is kept and not model.options
    tagged = write(tmp_path, PLAIN.replace("resnet3d", '"timm:efficientnet_b4", pretrained: ra2_in1k'))
    assert load(tagged, [f"model.name={name}"])[0].model.pretrained is False, "a tag is that of one model"


def test_the_delta_is_what_overrides_change(tmp_path: Path) -> None:
    path = write(tmp_path, f"{PLAIN}train: {{epochs: 5}}\n")
    assert load(path)[1] == {}
    assert load(path, ["train.epochs=5"])[1] == {}, "an override to the same value is no difference"
    assert load(path, ["train.epochs=6", "model.width=8"])[1] == {"train.epochs": 6, "model.width": 8}
    assert load(path, ["train.epochs="])[1] == {"train.epochs": 10}


RICH = """
name: 1e5.rich
model: {name: timm:x, widths: [1, 2], rate: 1e-7, label: "1e3", word: "no", deep: {a: {b: "2024-01-01"}}}
data: {file: "odd 'name' # $(x) %j.h5", augment: {flip: [0, 1], noise: 2.5e-2}, verify: 0.25}
train: {optimizer: {name: adam, betas: [0.8, 0.99]}, clip_norm: 1, checkpoint_every: 1h30min, monitor: loss}
launch: {instance: cedia-a100-40gb, mem: 1.5GB, time: 1-00:00:00, account: "0123", qos: "12e3", constraint: "a&b"}
"""


def test_the_resolved_experiment_reads_back_equal(tmp_path: Path) -> None:
    experiment = read(tmp_path, RICH)
    assert experiment.name == "1e5.rich" and experiment.launch.qos == "12e3"
    again = load(write(tmp_path, yamlfile.dump(experiment.as_dict()), "elsewhere/experiment.yaml"))[0]
    assert again == experiment
    assert yamlfile.dump(again.as_dict()) == yamlfile.dump(experiment.as_dict())


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), plain_values, max_size=4))
def test_every_value_that_yaml_writes_it_reads_back(value: dict[str, Any]) -> None:
    assert yamlfile.parse(yamlfile.dump(value), "here") == value


@pytest.mark.parametrize(
    "text", ["1e5", "1e-3", ".5e3", "yes", "null", "1:30", "0x10", "<<", "=", "2024-01-01", "-", ""]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    shared = [text]
    assert yamlfile.parse(yamlfile.dump({"a": shared, "b": shared}), "here") == {"a": [text], "b": [text]}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        *((90, 90), ("90s", 90), ("5min", 300), ("8h", 28800), ("1h30min", 5400), ("2d", 172800), ("1.5h", 5400)),
        *(("1-12:00:00", 129600), ("00:30:00", 1800), (" 2 h ", 7200), ("3600", 3600)),
    ],
)
def test_durations(written: object, seconds: int) -> None:
    assert units.seconds(written) == seconds


@pytest.mark.parametrize(
    "written", [0, -5, 0.5, "0s", "", "h", "5 parsecs", "1h-", "1:2:3:4", None, True, float("nan")]
)
def test_no_durations(written: object) -> None:
    with pytest.raises(ValueError, match="write 90s, 5min, 8h, 2d or 1-12:00:00"):
        units.seconds(written)


def test_times_as_yaml_reads_them_mean_what_slurm_means() -> None:
    """YAML 1.1 takes 8:00:00 for a number to the base of 60: the same seconds."""
    for text, seconds in (("8:00:00", 28800), ("08:00:00", 28800), ("1-00:00:00", 86400)):
        assert units.seconds(yamlfile.parse(text, "here")) == seconds


@pytest.mark.parametrize(
    ("written", "gigabytes"),
    [(60, 60), ("60GB", 60), ("500MB", 0.5), ("1.5T", 1500), ("2 gb", 2), ("1GiB", 1.073741824)],
)
def test_sizes(written: object, gigabytes: float) -> None:
    assert units.gigabytes(written) == pytest.approx(gigabytes)


@pytest.mark.parametrize("written", [0, -1, "", "GB", "5 bytes", "0.5MB", float("inf"), "9" * 400, True])
def test_no_sizes(written: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        units.gigabytes(written)


@pytest.mark.parametrize("total", [1, 59, 60, 3599, 86399, 86400, 259201])
def test_slurm_time_reads_back(total: int) -> None:
    assert units.seconds(units.slurm_time(total)) == total


def test_off_may_be_written_without_quotes(tmp_path: Path) -> None:
    text = "name: a\nmodel: {name: m}\ndata: {file: d.h5}\ntrain: {deterministic: off}\n"
    (tmp_path / "e.yaml").write_text(text)
    assert load(tmp_path / "e.yaml")[0].train.deterministic == "off"
