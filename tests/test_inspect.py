"""`hpc inspect`: its facts against NumPy and scikit-learn, what it warns of, damage, interrupts and mistakes."""

import json
import os
import signal
import subprocess
import sys
import zlib
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from rich.console import Console
from scipy import ndimage
from sklearn.utils.class_weight import compute_class_weight

from datasets import open_volumes, survey
from datasets.description import describe
from datasets.statistics import QUANTILES, Intensities
from datasets.survey import Survey, choose_samples
from hpc.training import Loss
from jobs.inspect_view import show
from tests.inspected import NAMES, damage, facts_of, run, volumes_of, write

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")


def alarms(facts, grave=None):
    return [one["text"] for one in facts["warnings"] if grave in (None, one["grave"])]


def numbers(dtype):
    kind = np.dtype(dtype)
    if kind.kind == "f":
        limit = float(np.finfo(np.float16).max)
        elements = st.floats(-limit, limit, width=kind.itemsize * 8)
    else:
        elements = st.integers(np.iinfo(kind).min, np.iinfo(kind).max)
    return arrays.arrays(kind, st.tuples(st.integers(1, 3), st.just(2), st.integers(1, 40)), elements=elements)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_statistics_are_those_of_numpy_in_blocks_of_any_size(dtype, data):
    samples = data.draw(numbers(dtype))
    scale, offset = np.array([0.5, -2.0], np.float32), np.array([-3.0, 1.0], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.statistics.BLOCK", data.draw(st.integers(1, 50)))
        seen = Intensities(len(samples), 2, samples.dtype)
        for place, sample in enumerate(samples):
            seen.add(place, sample, scale, offset)
    for channel in range(2):
        stored = samples[:, channel].astype(np.float64)
        normal = stored * scale[channel] + offset[channel]
        exact = np.quantile(stored, QUANTILES, method="inverted_cdf")
        near = 0 if dtype != "float32" else 1e-3
        assert np.allclose(seen.stored[channel].quantiles(), exact, rtol=near, atol=1e-38)
        expected = np.quantile(normal, QUANTILES, method="inverted_cdf")
        assert np.allclose(seen.normalised[channel].quantiles(), expected, rtol=2e-3, atol=2e-3 * np.abs(offset).max())
        assert seen.extremes(channel) == (stored.min(), stored.max())
        assert np.allclose(seen.moments(channel), (normal.mean(), normal.std()), rtol=1e-5, atol=1e-5)
    least = samples.min(axis=2, keepdims=True)
    assert seen.foreground_share() == pytest.approx((samples > least).mean())


def test_what_is_no_number_is_counted_apart(tmp_path, capsys):
    samples = volumes_of(6, dtype=np.float32)
    samples[1, 0, 0, :3] = np.nan
    samples[2, 0, 0, 0, :2] = np.inf, -np.inf
    samples[3] = np.nan
    samples[4] = 7
    facts = facts_of(capsys, write(tmp_path / "o.h5", samples, [0, 1, 2] * 2))
    voxels, size = facts["voxels"], samples[0].size
    assert voxels["nan"] == {"voxels": 30 + size, "samples": 2, "ids": ["s01", "s03"]}
    assert voxels["infinite"] == {"voxels": 2, "samples": 1, "ids": ["s02"]}
    assert voxels["constant"]["ids"] == ["s04"]
    finite = samples[np.isfinite(samples)]
    exact = np.quantile(finite, QUANTILES, method="inverted_cdf")
    assert np.allclose(list(facts["intensities"][0]["stored"].values()), exact, rtol=1e-3)
    assert len(alarms(facts, grave=True)) == 3 and f"{30 + size} NaN voxels in s01, s03" in alarms(facts)


def test_of_nothing_but_nan_there_are_no_numbers(tmp_path, capsys):
    path = write(tmp_path / "o.h5", np.full((2, 1, 4, 4, 4), np.nan, np.float32), [0, 1])
    assert facts_of(capsys, path, "--png", tmp_path / "o.png")["intensities"][0]["normalised_mean"] is None
    assert run(path) == 0 and "nan" not in capsys.readouterr().out.split("\n", 1)[1]


def test_counts_per_class_split_and_fold_and_weights(tmp_path, capsys):
    rng = np.random.default_rng(0)
    targets, group = rng.choice(3, 60, p=(0.6, 0.3, 0.1)), [f"g{number // 2}" for number in range(60)]
    split = np.repeat(rng.choice(SPLITS, 30, p=(0.6, 0.3, 0.1)), 2)
    fold = [None if s == "test" else number // 2 % 3 for number, s in enumerate(split)]
    path = write(tmp_path / "o.h5", volumes_of(60), targets, split=split, group=group, fold=fold)
    facts = facts_of(capsys, path)
    for number, name in enumerate(NAMES):
        has = targets == number
        assert [facts["classes"][name][s] for s in SPLITS] == [int((has & (split == s)).sum()) for s in SPLITS]
        assert facts["classes"][name]["folds"] == [sum(has[i] and fold[i] == f for i in range(60)) for f in range(3)]
    assert facts["groups"] == {s: int((split == s).sum()) // 2 for s in SPLITS}
    train = targets[split == "train"]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=train)
    assert np.allclose(facts["weights"]["class_weights"], expected)
    assert run(path) == 0
    out = capsys.readouterr().out
    pasted = yaml.safe_load(out[out.index("train:\n") :].split("warning")[0])
    assert np.allclose(Loss(**pasted["train"]["loss"]).class_weights, expected, rtol=1e-3)


def test_several_labels_are_counted_each_and_together(tmp_path, capsys):
    targets = np.random.default_rng(1).random((40, 3)) < (0.7, 0.4, 0.1)
    split = ["train"] * 30 + ["validation"] * 10
    path = write(tmp_path / "o.h5", volumes_of(40), targets.astype(np.uint8), task="multilabel", split=split)
    facts = facts_of(capsys, path)
    assert [facts["classes"][name]["train"] for name in NAMES] == targets[:30].sum(axis=0).tolist()
    labels, sets = facts["labels"], np.unique(targets, axis=0, return_counts=True)
    assert labels["distinct"] == len(sets[0]) and labels["without_any"]["train"] == (~targets[:30].any(axis=1)).sum()
    found = {tuple(one["classes"]): one["samples"] for one in labels["most_frequent"]}
    assert found == {tuple(np.array(NAMES)[row]): count for row, count in zip(*sets, strict=True)}
    positive = targets[:30].sum(axis=0)
    expected = np.where(positive, (30 - positive) / np.maximum(positive, 1), 0)
    assert np.allclose(facts["weights"]["pos_weight"], expected)
    assert run(path) == 0
    out = capsys.readouterr().out
    loss = Loss(**yaml.safe_load(out[out.index("train:\n") :].split("warning")[0])["train"]["loss"])
    assert loss.of_task("multilabel") == "bce" and np.allclose(loss.pos_weight, expected, rtol=1e-3)


def test_label_maps_are_counted_by_voxel(tmp_path, capsys):
    rng = np.random.default_rng(2)
    maps = rng.choice(3, (8, 12, 11, 10), p=(0.8, 0.15, 0.05)).astype(np.uint8)
    maps[0], maps[1] = 0, np.where(maps[1] == 2, 0, maps[1])
    split = ["train"] * 5 + ["validation"] * 3
    path = write(tmp_path / "o.h5", volumes_of(8), maps, task="segmentation", split=split)
    facts = facts_of(capsys, path)
    found = facts["segmentation"]
    for number, name in enumerate(NAMES):
        assert found["classes"][name]["share"]["train"] == pytest.approx((maps[:5] == number).mean())
        assert found["classes"][name]["samples"]["train"] == (maps[:5] == number).any(axis=(1, 2, 3)).sum()
        assert found["classes"][name]["share"]["test"] is None
    assert found["foreground_share"] == pytest.approx((maps > 0).mean()) and found["background_only"] == 1
    expected = compute_class_weight("balanced", classes=np.arange(3), y=maps[:5].ravel())
    assert np.allclose(facts["weights"]["class_weights"], expected)
    assert run(path) == 0 and "1 label map of left alone" in capsys.readouterr().out


def test_spacings_and_sources_are_spread_out(tmp_path, capsys):
    affines = [np.diag([1, 1.5, size, 1]) for size in (2, 2, 6)]
    sources = [(12, 11, 10), (12, 11, 10), (24, 22, 30)]
    path = write(tmp_path / "o.h5", volumes_of(3), [0, 1, 2], affine=affines, source_shape=sources)
    facts = facts_of(capsys, path)
    assert facts["spacing_mm"]["median"] == [1, 1.5, 2] and facts["spacing_mm"]["max"] == [1, 1.5, 6]
    assert facts["spacing_mm"]["most_frequent"][0] == {"value": [1, 1.5, 2], "samples": 2}
    assert facts["source_shapes"]["distinct"] == 2 and facts["source_shapes"]["max"] == [24, 22, 30]
    assert facts["shapes"]["distinct"] == 1 and facts["shapes"]["min"] == [1, 12, 11, 10]


def test_equal_samples_are_found_whatever_their_class_and_told_across_splits(tmp_path, capsys):
    samples, split = volumes_of(20), ["train"] * 10 + ["validation"] * 10
    samples[13], samples[2], samples[17] = samples[4], samples[1], samples[16]
    targets = [number % 3 for number in range(20)]
    targets[2], targets[1] = 1, 1
    path = write(tmp_path / "o.h5", samples, targets, split=split)
    facts = facts_of(capsys, path)
    equal = facts["duplicates"]
    assert (equal["sets"], equal["samples"], equal["leaking"], equal["confirmed"]) == (3, 6, 1, 3)
    assert equal["listed"][0]["ids"] == ["s04", "s13"] and equal["listed"][0]["places"] == ["train", "validation"]
    assert {tuple(one["ids"]) for one in equal["listed"]} == {("s04", "s13"), ("s01", "s02"), ("s16", "s17")}
    assert equal["differently_labelled"] == 1  # s16 and s17
    assert "s04 (train) and s13 (validation)" in alarms(facts, grave=True)[0]


def test_of_many_sets_one_that_leaks_and_one_of_two_labels_are_listed(tmp_path, capsys):
    samples, split = np.repeat(volumes_of(30), 2, axis=0), ["train"] * 60
    targets, split[:44:2] = [0] * 60, ["test"] * 22
    targets[59] = 1
    facts = facts_of(capsys, write(tmp_path / "o.h5", samples, targets, split=split))
    assert (facts["duplicates"]["sets"], facts["duplicates"]["leaking"]) == (30, 22)
    assert len(facts["duplicates"]["listed"]) == 20 and facts["duplicates"]["listed"][1]["labels"] == ["left", "right"]
    assert "s00 (test) and s01 (train)" in alarms(facts)[0] and "s58, s59 (left, right)" in alarms(facts)[1]
    run(tmp_path / "o.h5")
    assert "and 27 more sets; --json lists the first 20" in " ".join(capsys.readouterr().out.split())


def test_of_many_duplicates_some_are_compared_unless_all_are_asked_for(tmp_path, monkeypatch, capsys):
    samples = np.repeat(volumes_of(10), 2, axis=0)
    path = write(tmp_path / "o.h5", samples, [0] * 20, split=["train"] * 19 + ["test"])
    monkeypatch.setattr("datasets.description.LOOK_BYTES", 5 * samples[0].nbytes)
    found = describe(open_volumes(path))["duplicates"]
    assert (found["sets"], found["confirmed"], found["leaking"]) == (10, 2, 1)
    assert found["listed"][0]["ids"] == ["s18", "s19"] and found["listed"][0]["confirmed"]
    assert describe(open_volumes(path), verify=True)["duplicates"]["confirmed"] == 10
    assert run(path) == 0 and "10 sets of 20 samples in all (2 compared byte for byte" in capsys.readouterr().out


def with_sum(inputs, wanted, tail):
    """The same input bytes but for the last four, so that the CRC-32 with `tail` is `wanted`: it is linear in them."""
    data = bytearray(inputs.tobytes())
    data[-4:] = bytes(4)
    base = zlib.crc32(tail, zlib.crc32(data))
    rows = []
    for bit in range(32):
        data[-4:] = (1 << bit).to_bytes(4, "little")
        rows.append([zlib.crc32(tail, zlib.crc32(data)) ^ base, 1 << bit])
    found = 0
    for bit in reversed(range(32)):
        pivot = next(row for row in rows if row[0] >> bit & 1 and row[0] < 2 << bit)
        rows.remove(pivot)
        rows = [[r[0] ^ pivot[0], r[1] ^ pivot[1]] if r[0] >> bit & 1 else r for r in rows]
        if (wanted ^ base) >> bit & 1:
            base, found = base ^ pivot[0], found ^ pivot[1]
    data[-4:] = found.to_bytes(4, "little")
    return np.frombuffer(bytes(data), inputs.dtype).reshape(inputs.shape)


def test_equal_checksums_alone_make_no_duplicates(tmp_path, capsys):
    samples, tail = volumes_of(6), np.int64(1).tobytes()
    samples[5] = with_sum(samples[5], zlib.crc32(tail, zlib.crc32(samples[2])), tail)
    path = write(tmp_path / "o.h5", samples, [1] * 6)
    assert len(set(open_volumes(path).checksums.tolist())) == 5
    assert facts_of(capsys, path)["duplicates"]["sets"] == 0


def body(seed):
    """A smooth head with structures of its own."""
    shape, rng = (30, 28, 26), np.random.default_rng(seed)
    inside = ndimage.gaussian_filter(np.pad(np.ones([n - 8 for n in shape]), 4), 2)
    return (inside * (300 + 3000 * ndimage.gaussian_filter(rng.normal(size=shape), 3))).clip(0).astype(np.int16)


def test_what_looks_alike_is_told_across_groups(tmp_path, capsys):
    samples = [body(seed)[None] for seed in range(8)]
    noise = np.random.default_rng(0).integers(0, 8, samples[0].shape).astype(np.int16)
    samples += [samples[2] + noise, samples[3] + noise]
    split, group = ["train"] * 8 + ["test", "train"], [f"g{n}" for n in range(9)] + ["g3"]
    facts = facts_of(capsys, write(tmp_path / "o.h5", samples, [0] * 10, split=split, group=group))
    near = facts["near_duplicates"]
    assert (near["compared"], near["pairs"], near["of_one_group"], near["leaking"]) == (10, 2, 1, 1)
    assert near["listed"] == [{"ids": ["s02", "s08"], "places": ["train", "test"], "leaks": True}]
    assert "s02 (train) and s08 (test)" in alarms(facts, grave=True)[0] and facts["duplicates"]["sets"] == 0


def test_threads_change_nothing(tmp_path):
    volumes = open_volumes(write(tmp_path / "o.h5", volumes_of(50, dtype=np.float32), [0, 1] * 25))
    found = []
    for threads in (1, 3):
        seen = Survey(volumes, range(50))
        seen.run(range(50), threads=threads)
        found.append((seen.intensities.moments(0), seen.intensities.stored[0].quantiles(), sorted(seen.prints)))
    assert found[0] == found[1]


def test_a_draw_is_looked_at_spread_over_the_file(tmp_path, monkeypatch):
    volumes = open_volumes(write(tmp_path / "o.h5", volumes_of(40), [number % 2 for number in range(40)]))
    chosen = choose_samples(volumes, 10 * 12 * 11 * 10 * 2)
    assert (chosen // 4).tolist() == list(range(10))
    assert set(volumes.targets[chosen].tolist()) == {0, 1}  # as evenly spaced ones would not
    monkeypatch.setattr("datasets.survey.MOST_LOOKED", 10)
    facts, all_facts = describe(volumes), describe(volumes, everything=True)
    assert facts["looked_at"] == {"samples": 10, "bytes": 26400, "all": False} and facts["checksums_compared"] == 10
    assert all_facts["looked_at"]["samples"] == 40 and all_facts["intensities"] != facts["intensities"]


def test_damaged_samples_are_named_with_their_file(tmp_path, capsys):
    halves = [
        write(tmp_path / f"p{n}.h5", volumes_of(6, seed=n), [0] * 6, id=[f"{n}-{i}" for i in range(6)]) for n in (0, 1)
    ]
    size = 12 * 11 * 10 * 2
    start = open_volumes(halves[1]).shards[0].inputs.offset
    damage(halves[1], start + 2 * size), damage(halves[1], start + 5 * size + 8)
    pattern = tmp_path / "p*.h5"
    facts = facts_of(capsys, pattern, "--verify", code=1)
    assert [(one["id"], one["sample"], one["file"]) for one in facts["damaged"]] == [
        ("1-2", 8, str(halves[1])),
        ("1-5", 11, str(halves[1])),
    ]
    assert facts["checksums_compared"] == 12 and facts["num_samples"] == 12
    assert run(pattern, "--verify") == 1
    shown = capsys.readouterr()
    assert f"damaged: 1-2 (number 8) of {halves[1]}: its bytes are not those that were packed" in shown.err
    assert "2 of 12 samples are damaged" in shown.out and "2 damaged sample(s)" in shown.err
    assert run(halves[0], "--verify") == 0 and "all 6 samples are sound" in capsys.readouterr().out


def test_what_cannot_be_read_is_listed_and_does_not_end_the_run(tmp_path, monkeypatch):
    path = write(tmp_path / "o.h5", volumes_of(6), [0] * 6)
    volumes, opened = open_volumes(path), survey.Reader

    def cut_after_opening(volumes):
        reader = opened(volumes)
        os.truncate(path, volumes.shards[0].inputs.offset + 4 * 2640 + 7)
        return reader

    monkeypatch.setattr(survey, "Reader", cut_after_opening)
    facts = describe(volumes, verify=True)
    assert [one["id"] for one in facts["damaged"]] == ["s04", "s05"]
    assert all("it cannot be read: it ends" in one["reason"] for one in facts["damaged"])
    assert facts["intensities"][0]["max"] == volumes_of(6)[:4].max()


LAYOUTS = {
    "contiguous": {},
    "whole chunks": {"chunk": (12, 11, 10), "codec": "blosc2-lz4"},
    "patch chunks": {"chunk": (5, 6, 7), "codec": "zstd"},
    "plain patch chunks": {"chunk": (5, 6, 7)},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_changes_no_fact(tmp_path, capsys, layout):
    maps = np.random.default_rng(3).integers(0, 3, (8, 12, 11, 10)).astype(np.uint8)
    facts = []
    for name, storage in (("a", {}), ("b", layout)):
        path = write(tmp_path / f"{name}.h5", volumes_of(8), maps, task="segmentation", **storage)
        facts.append(facts_of(capsys, path, "--verify", "--png", tmp_path / f"{name}.png"))
        facts[-1].pop("files")
    assert facts[0] == facts[1]
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"]
    assert (pictures[0][40:] == pictures[1][40:]).all()


@pytest.mark.parametrize("codec", ["blosc2-lz4", "zstd", "bitshuffle-lz4"])
def test_a_chunk_that_does_not_decode_is_one_damaged_sample(tmp_path, capsys, codec):
    path = write(tmp_path / "o.h5", volumes_of(8), [0] * 8, codec=codec)
    chunks = open_volumes(path).shards[0].inputs.chunks
    damage(path, int(chunks.offsets[3, 0]), bytes(int(chunks.sizes[3, 0])))
    facts = facts_of(capsys, path, "--verify", "--png", tmp_path / "o.png", code=1)
    assert [(one["id"], one["file"]) for one in facts["damaged"]] == [("s03", str(path))]
    assert "bytes" in facts["damaged"][0]["reason"] and str(path) not in facts["damaged"][0]["reason"]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_volumes_of_different_shapes_are_described(tmp_path, capsys, task):
    shapes = [(2, 12, 11, 10), (2, 8, 11, 14), (2, 12, 11, 10), (2, 20, 5, 6)]
    samples = [volumes_of(1, shape, seed=number)[0] for number, shape in enumerate(shapes)]
    maps = [(sample[0] > 150).astype(np.uint8) for sample in samples]
    path = write(tmp_path / "o.h5", samples, maps if task == "segmentation" else [0, 1] * 2, task=task)
    facts = facts_of(capsys, path, "--verify", "--png", tmp_path / "o.png")
    assert facts["shapes"]["distinct"] == 3 and facts["shapes"]["most_frequent"][0]["samples"] == 2
    assert (facts["shapes"]["min"], facts["shapes"]["max"]) == ([2, 8, 5, 6], [2, 20, 11, 14])
    assert facts["shapes"]["median"] == [2, 12, 11, 10]
    both = np.concatenate([sample[1].ravel() for sample in samples])
    exact = np.quantile(both, QUANTILES, method="inverted_cdf")
    assert list(facts["intensities"][1]["stored"].values()) == exact.tolist()
    assert run(path) == 0 and "4 samples of 3 shapes int16" in capsys.readouterr().out


def test_an_interrupt_leaves_with_130(tmp_path):
    path = write(tmp_path / "o.h5", volumes_of(600, (1, 4, 4, 4)), [0] * 600)
    script = (
        "import os, signal, sys, time, datasets.survey as s; take = s.Survey.take\n"
        "def slow(self, *a): take(self, *a); print('x'); os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "s.Survey.take = slow\n"
        "from jobs.inspect import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, str(path), "--verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr == "hpc inspect: interrupted\n" and done.stdout.count("x") < 100


@pytest.mark.parametrize("width", [80, 120])
def test_wide_class_lists_are_whole_at_any_width(tmp_path, width):
    names = [f"{side} {n} gyrus of the superior temporal region" for side in ("left", "right") for n in range(20)]
    names += ["ctx-lh-" + "bankssts" * 12]
    targets = list(range(41))
    path = write(tmp_path / "o.h5", volumes_of(41), targets, names, fold=[n % 9 for n in range(41)])
    console = Console(file=StringIO(), width=width, highlight=False, markup=False)
    show(describe(open_volumes(path)), console)
    lines = console.file.getvalue().splitlines()
    assert "…" not in console.file.getvalue()
    for line in lines:
        assert len(line) <= width or line.startswith(("warning:", str(path)))
    first = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│")).replace(" ", "")
    for name in names:
        assert first.count(name.replace(" ", "")) >= 3  # in the classes and two tables of folds


def not_hdf5(folder):
    (folder / "labels.csv").write_text("id,label\n")
    return ["labels.csv"], "labels.csv is not an HDF5 file"


def half(folder):
    path = write(folder / "half.h5", volumes_of(4), [0] * 4)
    os.truncate(path, path.stat().st_size // 2)
    return ["half.h5"], "half.h5 is cut short or damaged"


def other_format(folder):
    import h5py

    with h5py.File(folder / "o.h5", "w") as file:
        file["x"] = [1]
    return ["o.h5"], "o.h5 has no attribute 'format'"


def unlike_shards(folder):
    write(folder / "a.h5", volumes_of(2), [0] * 2)
    write(folder / "b.h5", volumes_of(2, (1, 4, 4, 4)), [0] * 2, id=["x", "y"])
    return ["a.h5", "b.h5"], "shards must agree"


def over_the_file(folder):
    write(folder / "a.h5", volumes_of(2), [0] * 2)
    return ["a.h5", "--png", "a.h5"], "a.h5 exists and is no PNG"


def nowhere(folder):
    write(folder / "a.h5", volumes_of(2), [0] * 2)
    return ["a.h5", "--png", "no/a.png"], "its folder does not exist"


MISTAKES = [not_hdf5, half, other_format, unlike_shards, over_the_file, nowhere]
MISTAKES += [
    lambda folder: (["no.h5"], "no.h5 does not exist"),
    lambda folder: (["n*.h5"], "no file is named like n*.h5"),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    arguments, words = mistake(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_empty_splits_are_told(tmp_path, capsys):
    facts = facts_of(capsys, write(tmp_path / "o.h5", volumes_of(4), [0, 1] * 2, split=["test"] * 4))
    assert facts["weights"] == {"class_weights": None, "pos_weight": None}
    assert alarms(facts, grave=True) == ["no sample is in the training split"]
    assert alarms(facts, grave=False) == ["no sample is in the validation split", "no sample of neither"]


@pytest.mark.parametrize("words", ["inspect {path} --json", "models"])
def test_what_is_printed_can_be_cut_off(tmp_path, words):
    path = write(tmp_path / "o.h5", volumes_of(4), [0, 1] * 2)
    command = f"{sys.executable} -m jobs.{words.format(path=path)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 128 + signal.SIGPIPE) and not done.stderr


def test_documented_keys_are_those_printed(tmp_path, capsys):
    facts = facts_of(capsys, write(tmp_path / "o.h5", volumes_of(4), [0, 1] * 2))
    text = (ROOT / "docs" / "data.md").read_text().split("## Look before you train")[1].split("\n## ")[0]
    assert [key for key in facts if f"`{key}`" not in text] == []
    assert json.loads(json.dumps(facts)) == facts
