"""The pictures of `hpc inspect --png`: right way up, in their colours and proportions, titles apart, faults in them."""

import nibabel
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from datasets import open_volumes
from jobs import inspect, montage, pack
from jobs.montage import CELL, LARGE_CELL, UNNAMED_COLOUR, Painter, draw_montage
from jobs.palette import class_colour
from jobs.sheet import GAP, LINE, MARGIN, NARROWEST, Picture, Row, Sheet, shorten, wrap
from jobs.slices import NAN_COLOUR
from tests.inspected import damage, volumes_of, write


def paint(path, sample=0, cell=CELL):
    painter = Painter(open_volumes(path))
    painter.cell = cell
    return painter.paint(sample, "title")


def corners(pixels):
    """Means of the four quarters: top left, top right, bottom left, bottom right."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    quarters = pixels[:height, :width], pixels[:height, -width:], pixels[-height:, :width], pixels[-height:, -width:]
    return [round(float(quarter.mean())) for quarter in quarters]


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LIP", "PSR"])
def test_a_packed_scan_lies_as_nibabel_shows_it_whatever_its_stored_orientation(tmp_path, axes, capsys):
    data = np.zeros((20, 20, 6), np.int16)
    data[12:, 12:, :] = 100  # the patient's right, front
    data[:4, :4, :] = 50  # left, back
    ras = nibabel.Nifti1Image(data, np.eye(4))
    turn = nibabel.orientations.axcodes2ornt(axes)
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), turn)
    nibabel.save(ras.as_reoriented(turn), tmp_path / "a.nii.gz")
    (tmp_path / "l.csv").write_text("id,label\na,x\n")
    options = ["--labels", str(tmp_path / "l.csv"), "--split", "100/0/0"]
    assert pack.main([str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "o.h5"), *options]) == 0
    assert inspect.main([str(tmp_path / "o.h5"), "--png", str(tmp_path / "o.png")]) == 0
    left = corners(paint(tmp_path / "o.h5")[0].pixels)
    assert left[1] > left[2] > left[0] == left[3]
    sheet = np.asarray(Image.open(tmp_path / "o.png").convert("RGB"))
    assert "1x20x20x6 int16" in capsys.readouterr().out
    assert sheet.shape[1] == NARROWEST and (sheet == (255, 255, 255)).all(axis=2).mean() > 0.3


def test_images_keep_row_0_on_top_and_their_colours(tmp_path):
    image = np.zeros((3, 10, 20), np.uint8)
    image[:, :5, :10] = np.array([200, 100, 50])[:, None, None]
    pixels = paint(write(tmp_path / "o.h5", [image, image], [0, 1]))[0].pixels
    assert pixels.shape == (CELL // 2, CELL, 3)
    assert pixels[0, 0].tolist() == [200, 100, 50] and not pixels[-1, -1].any() and not pixels[0, -1].any()


def test_an_images_three_channels_of_any_dtype_are_colours_of_one_range(tmp_path):
    image = np.zeros((3, 10, 10), np.float32)
    image[0, :5], image[1, 5:] = 4.0, 2.0
    pixels = paint(write(tmp_path / "o.h5", [image, image], [0, 1]))[0].pixels
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[-1, 0].tolist() == [0, 128, 0]


def test_of_other_channels_the_first_is_grey(tmp_path):
    image = np.zeros((4, 10, 10), np.int16)
    image[0, :5], image[1, 5:] = 300, 3000
    path = write(tmp_path / "o.h5", [image, image], [0, 1])
    pixels = paint(path)[0].pixels
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[-1, 0].tolist() == [0] * 3


def test_thick_slices_keep_their_true_proportions(tmp_path):
    affine = [np.diag([1.0, 3.0, 1.0, 1.0])] * 2
    pixels = paint(write(tmp_path / "o.h5", volumes_of(2, (1, 20, 10, 4)), [0, 1], affine=affine))[0].pixels
    assert pixels.shape[:2] == (CELL, CELL * 20 // 30)


def test_labels_lie_in_colours_over_the_slice_that_has_most(tmp_path):
    inputs = np.full((2, 1, 10, 10, 5), 100, np.int16)
    inputs[:, :, :, :, 3] = np.linspace(0, 200, 10, dtype=np.int16)[None, None, :, None]
    maps = np.zeros((2, 10, 10, 5), np.uint8)
    maps[0, 5:, 5:, 3], maps[0, 0, 0, 1] = 2, 1
    path = write(tmp_path / "o.h5", inputs, maps, task="segmentation")
    painter = Painter(open_volumes(path))
    plain, overlay = (picture.pixels.astype(int) for picture in painter.paint(0, "title"))
    changed = (plain != overlay).any(axis=2)
    height, width = changed.shape[0] // 2, changed.shape[1] // 2
    assert changed[:height, width:].all() and not changed[height:].any() and not changed[:, :width].any()
    assert painter.labels == {2}
    colour = np.array(class_colour(2))
    assert np.abs(overlay[0, -1] - (plain[0, -1] + colour) / 2).max() <= 1
    assert [picture.note for picture in painter.paint(1, "title")] == ["train, constant", "no label voxel"]


def test_the_legend_names_what_is_drawn_and_what_has_no_name_is_white(tmp_path):
    inputs, maps = np.zeros((1, 1, 8, 8), np.uint8), np.zeros((1, 8, 8), np.uint8)
    maps[0, :4] = 1
    path = write(tmp_path / "o.h5", inputs, maps, task="segmentation")
    draw_montage(open_volumes(path), tmp_path / "o.png")
    sheet = np.asarray(Image.open(tmp_path / "o.png").convert("RGB"))
    assert (sheet[-MARGIN - LINE :] == class_colour(1)).all(axis=2).any()
    damaged = open_volumes(path).shards[0].targets.offset
    damage(path, damaged, bytes([9] * 8))
    overlay = paint(path)[1].pixels
    assert overlay[0, 0].tolist() == [round((128 + part) / 2) for part in UNNAMED_COLOUR]


def test_what_is_constant_missing_or_infinite_is_drawn(tmp_path):
    samples = volumes_of(4, (1, 8, 8, 4), np.float32)
    samples[0], samples[1], samples[2, 0, 4:, 4:], samples[3, 0, 0, 0] = 5, np.nan, np.nan, np.inf
    path = write(tmp_path / "o.h5", samples, [0] * 4)
    same, missing, partly, infinite = (paint(path, sample)[0] for sample in range(4))
    assert (same.pixels == 128).all() and same.note == "train, constant"
    assert (missing.pixels == NAN_COLOUR).all()
    magenta = (partly.pixels == NAN_COLOUR).all(axis=2)
    assert magenta.mean() == pytest.approx(0.25, abs=0.02) and magenta[0, -1]
    assert infinite.pixels[-1, 0].tolist() == [255] * 3 and infinite.pixels.std() > 10


def test_a_few_bright_voxels_are_seen(tmp_path):
    sample = np.zeros((1, 100, 100), np.int16)
    sample[0, 50, 50] = 10
    assert paint(write(tmp_path / "o.h5", [sample, sample], [0, 1]))[0].pixels.max() == 255


def test_what_cannot_be_read_is_a_grey_place(tmp_path):
    path = write(tmp_path / "o.h5", volumes_of(3), [0, 1, 2])
    volumes = open_volumes(path)
    painter = Painter(volumes)
    damage(path, path.stat().st_size, b"x")
    assert painter.paint(0, "title") == [Picture("title", "train, cannot be read", None)]
    Sheet([], [Row("all", painter.paint(0, "title"))], [], CELL).draw()
    assert Painter(open_volumes(path), {1}).paint(1, "title")[0].note == "train, damaged"


def titles(volumes, samples):
    return list(montage._titles(volumes, samples).values())


def test_titles_of_neighbouring_pictures_do_not_overlap(tmp_path):
    ids = [f"sub-{n:03d}_SESSION-BASELINE_SPACE-MNI152NLIN2009_{n * 7919 % 1000:040d}" for n in range(8)]
    path = write(tmp_path / "o.h5", volumes_of(8, (1, 9, 9, 4)), [0] * 4 + [1] * 4, id=ids)
    draw_montage(open_volumes(path), tmp_path / "o.png")
    sheet = np.asarray(Image.open(tmp_path / "o.png").convert("L"))
    gaps = [MARGIN + number * (LARGE_CELL + GAP) - GAP // 2 for number in range(1, 4)]
    rows = slice(MARGIN + 4 * LINE + 4, None)
    assert all((sheet[rows, gap] == 255).all() for gap in gaps)
    assert (sheet[:, -MARGIN:] == 255).all() and (sheet[:, :MARGIN] == 255).all() and (sheet[-MARGIN:] == 255).all()


def test_long_ids_lose_what_they_share(tmp_path):
    ids = [f"site-north/patient-{n:04d}_session-baseline_T1w" for n in (1, 12, 345)]
    volumes = open_volumes(write(tmp_path / "o.h5", volumes_of(3), [0, 1, 2], id=ids))
    assert titles(volumes, [0, 1, 2]) == ["...001...", "...012...", "...345..."]
    assert titles(volumes, [1]) == [ids[1]]
    volumes = open_volumes(write(tmp_path / "p.h5", volumes_of(2), [0, 1], id=["a_1", "a_2"]))
    assert titles(volumes, [0, 1]) == ["a_1", "a_2"]


def test_texts_fit_into_their_width():
    font = ImageFont.load_default(12)
    pen = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    text = "a word and " + "w" * 200 + " more words " * 20
    for line in [*wrap(text, font, 150), shorten("x" * 300, font, 150), shorten("i", font, 1)]:
        assert pen.textlength(line, font) <= 150
    assert shorten("short", font, 150) == "short" and shorten("abc/" * 50 + "end", font, 100).endswith("end")
    assert " ".join(wrap("all the words are kept", font, 60)).split() == ["all", "the", "words", "are", "kept"]


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_row_for_each_class_the_empty_ones_too(tmp_path, task):
    names = [f"class {number}" for number in range(60)]
    samples, targets = volumes_of(8, (1, 6, 6)), [number % 2 for number in range(8)]
    if task == "multilabel":
        targets = np.eye(60, dtype=np.uint8)[targets]
        targets[7] = 0
    volumes = open_volumes(write(tmp_path / "o.h5", samples, targets, names, task))
    rows = montage._choose(volumes)
    assert len(rows) == montage.MOST_ROWS + (task == "multilabel")
    assert rows["class 0: 4 samples"] == [0, 2, 4, 6] and rows["class 2: 0 samples"] == []
    assert rows.get("no class: 1 sample", [7]) == [7]
    assert f"the first {montage.MOST_ROWS} of 60 classes" in montage._caption(volumes)


def test_of_large_volumes_fewer_are_read(tmp_path, monkeypatch):
    volumes = open_volumes(write(tmp_path / "o.h5", volumes_of(30), [0, 1, 2] * 10))
    assert [len(samples) for samples in montage._choose(volumes).values()] == [6] * 3
    monkeypatch.setattr(montage, "MOST_BYTES", 6 * volumes_of(1).nbytes)
    assert [len(samples) for samples in montage._choose(volumes).values()] == [2] * 3
