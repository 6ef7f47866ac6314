"""Recipes: each plans and builds at full size, and its tiny form learns (one of each task; all: `make recipes`)."""

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from hpc import instances, recipes
from hpc.errors import UserError
from hpc.experiment import Source, flatten, load
from hpc.rundir import read_json
from models3d import create_model
from tests.conftest import MEASURED
from tests.recipes import ROOT, ROWS, Played, Row, hpc, play

ALL = os.environ.get("HPC_RECIPES") == "all"
NAMES = sorted(path.stem for path in (ROOT / "jobs" / "recipes").glob("*.yaml"))
PARAMETERS = {"cedia-resnet3d": 15_335_267, "cedia-transformer3d": 28_782_083}
"""Of those that the seed counts, with one channel and three classes."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("row", [row for row in ROWS if ALL or row.sooner], ids=lambda row: row.recipe)
def test_a_tiny_form_learns(row: Row, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    played = play(row, tmp_path / "play", *(() if ALL else row.sooner))
    if ALL:
        record_property(MEASURED, played.line(row))
    for score, baseline in ((played.score, played.baseline), played.held_out):
        assert score > baseline + row.margin, played.line(row) + "\n" + played.log
    _check_result(row, played)
    _check_figures(played)
    if played.sources:
        _check_predictions(played)


def _check_result(row: Row, played: Played) -> None:
    result = read_json(played.run.result)
    for key in ("task", "baseline", "best", "last", "monitor", "direction", "per_class", "confusion_matrix", "usage"):
        assert result[key] is not None, key
    best = result["best"]["metrics"]
    # evaluated again: the same weights and samples; of patches, whole volumes in windows in place of their centres
    whole = load(played.run.experiment)[0].data.patch is None
    assert best[row.metric] == pytest.approx(played.score, abs=1e-4 if whole else 0.1)
    assert result["baseline"][row.metric] == pytest.approx(played.baseline, abs=1e-6 if whole else 0.1)


def _check_figures(played: Played) -> None:
    figures = {path.stem: path for path in played.run.figures.glob("*.png")}
    assert "curves" in figures and len(figures) >= 2, sorted(figures)
    for path in figures.values():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 100 and len(np.unique(pixels)) > 8 and pixels.std() > 5, f"{path} is blank"


def _check_predictions(played: Played) -> None:
    """A line for each file whose scores are probabilities; of a segmentation a map for each, where its file is."""
    result = read_json(played.run.result)
    maps = result["task"] == "segmentation"
    with (played.predicted / ("volumes.csv" if maps else "predictions.csv")).open() as file:
        assert len(list(csv.DictReader(file))) == len(played.sources) * (len(result["class_names"]) if maps else 1)
    for source in played.sources if maps else ():
        (mask,) = [path for path in played.predicted.rglob(f"{source.name.split('.')[0]}*") if path.is_file()]
        if source.name.endswith(".nii.gz"):
            image, truth = nibabel.load(mask), nibabel.load(source)
            assert image.shape == truth.shape and np.allclose(image.affine, truth.affine)


def test_the_table_has_every_recipe() -> None:
    assert sorted(row.recipe for row in ROWS) == NAMES
    assert {load(Path(row.recipe))[0].task for row in ROWS if row.sooner} == {
        "classification",
        "multilabel",
        "segmentation",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_what_a_reader_needs(name: str) -> None:
    lines = (ROOT / "jobs" / "recipes" / f"{name}.yaml").read_text().splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert 20 < len(head[0]) <= 120 and head[1] == "#", head[:2]
    for word in ("Document:", "Hardware", "uration", "Expected:", "Open:"):
        assert any(word in line for line in head), f"{name}: {word}"


@pytest.mark.parametrize("tiny", [False, True], ids=["full", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_instance_and_its_model_builds(name: str, tiny: bool) -> None:
    experiment, _ = load(Path(name), tiny=tiny)
    assert experiment.name == name + "-tiny" * tiny
    instance = instances.find(experiment.launch.instance)
    assert instance.check(instance.request(experiment.launch)) == []
    assert experiment.batch_fault(tasks=1) is None
    channels, classes = (1, 3) if "3d" in name else (3, 7)
    with torch.device("meta"):
        model = create_model(experiment.model.name, channels, classes, **_options(experiment.model.options))
    count = sum(parameter.numel() for parameter in model.parameters())
    if tiny:
        assert 10_000 < count < 15e6
    else:
        assert count == PARAMETERS.get(name, count) and count > 100_000


def _options(options: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in options.items() if key != "pretrained"}


def test_plan_of_a_recipe_misses_its_data_alone(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(AssertionError, match="left with 2"):
        hpc(tmp_path, log, "plan", "cedia-resnet3d")
    refused = [line for line in log[0].splitlines() if line.startswith("refused")]
    assert len(refused) == 1 and f"{tmp_path}/scans.h5 does not exist" in refused[0]


def test_variants_are_small_and_their_tiny_forms_differ() -> None:
    """A variant says what differs; its tiny form still differs from its base's in more than the name."""
    listed = {recipe.name: recipe for recipe in recipes.listed()}
    variants = [recipe for recipe in listed.values() if recipe.base]
    assert len(variants) >= 10
    for recipe in variants:
        assert recipe.base in listed
        own, theirs = (flatten(load(Path(one), tiny=True)[0].as_dict()) for one in (recipe.name, recipe.base))
        differing = {key for key in own | theirs if own.get(key) != theirs.get(key)} - {"name"}
        same = {"efficientnet-b4-finetune-cuda", "image-template-cpu"}  # they differ in hardware
        assert differing or recipe.name in same, recipe.name


def test_tiny_forms_run_here_on_real_data() -> None:
    from jobs.realdata.catalogue import DATA, WEIGHTS

    for name in NAMES:
        experiment, delta = load(Path(name), tiny=True)
        assert experiment.name == f"{name}-tiny" and experiment.launch.instance == "laptop"
        for file, known in ((experiment.data.file, DATA), (experiment.model.weights, WEIGHTS)):
            assert file is None or (Path(file).parent == Path.cwd() / recipes.DATA and Path(file).stem in known)
        assert delta["data.file"] == experiment.data.file


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine.yaml").write_text("base: cedia-resnet3d\nname: mine\nmodel: {width: 16}\n")
    yield tmp_path


def test_a_recipe_is_a_base_by_its_name(user: Path) -> None:
    experiment, delta = load(Path("mine.yaml"))
    assert delta == {"name": "mine", "model.width": 16}
    assert experiment.model.name == "resnet3d" and experiment.data.file == str(user / "scans.h5")
    assert Source(Path("mine.yaml"), tiny=True).resolve()[0].name == "mine-tiny"


def test_a_file_beside_comes_before_a_recipe(user: Path) -> None:
    (user / "cedia-resnet3d").write_text("name: other\nmodel: {name: m}\ndata: {file: x.h5}\n")
    assert load(Path("cedia-resnet3d"))[0].name == "other"
    assert load(Path("mine.yaml"))[0].model.name == "m"


def test_unknown_names_list_the_near_ones(user: Path) -> None:
    with pytest.raises(UserError, match="'cedia-resnet' is no file here and no recipe: did you mean 'cedia-resnet3d'"):
        load(Path("cedia-resnet"))
    (user / "other.yaml").write_text("base: cedia-resne3d\nname: other\n")
    with pytest.raises(UserError, match="'cedia-resne3d' is no file here and no recipe"):
        load(Path("other.yaml"))
    with pytest.raises(UserError, match="sub/cedia-resnet3d: no such file"):
        load(Path("sub/cedia-resnet3d"))


def test_what_is_no_recipe_has_no_tiny_form(user: Path) -> None:
    (user / "own.yaml").write_text("name: own\nmodel: {name: m}\ndata: {file: x.h5}\n")
    with pytest.raises(UserError, match=r"own.yaml has no tiny form: .*'hpc recipes' lists them"):
        load(Path("own.yaml"), tiny=True)


def test_missing_data_of_a_tiny_form_is_made_by_a_child(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def child(module: str, arguments: list[str], **_: object) -> int:
        asked.append([module, *arguments])
        return 0

    monkeypatch.setattr("hpc.payload.child", child)
    recipes.fetch([load(Path("cedia-resnet3d"))[0]])  # the user's own file is the user's to make
    assert asked == []
    tiny = [load(Path(name), tiny=True)[0] for name in ("cedia-resnet3d", "cedia-transformer3d", "vit-finetune")]
    recipes.fetch(tiny)
    folder = str(user / "recipes-data")
    assert asked == [["jobs.realdata", stem, "-o", folder] for stem in ("landcover", "structures-small", "vit_tiles")]
    asked.clear()
    recipes.fetch([load(Path("cedia-resnet3d"), ["data.file=mine.h5"], tiny=True)[0]])
    assert asked == []
    monkeypatch.setattr("hpc.payload.child", lambda *_, **__: 1)
    with pytest.raises(UserError, match=r"structures-small.h5 could not be made"):
        recipes.fetch(tiny[:1])


def test_hpc_recipes_lists_them(tmp_path: Path) -> None:
    text = hpc(tmp_path, [], "recipes")
    assert [line.split()[0] for line in text.splitlines()[1:]] == NAMES
    assert hpc(tmp_path, [], "recipes", "--json").count('"summary": "') == len(NAMES)
