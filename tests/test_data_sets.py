"""Data sets, made here in their public layouts: classes, ignored labels, metres, crops; and what is wrong with them."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import clsspec
import eval_dense
from eval_dense import PROTOCOLS
from test_eval_dense import CPU, SHORT, Oracle, tree


def save(file: Path, values, mode="L", size=(16, 16)):
    """A picture of one value, or of the given rows. 16-bit for mode I;16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    t = torch.as_tensor(values)
    t = t.expand(size) if t.ndim == 0 else t
    img = Image.fromarray(t.to(torch.uint16 if mode == "I;16" else torch.uint8).numpy().copy())
    img.convert(mode).save(file) if mode in ("P", "RGB") else img.save(file)


def opened(data, at, **how):
    p = replace(PROTOCOLS[data], **{"image_size": 0, "crop": 0, "window": 0} | how)
    return eval_dense.open_set(data, str(at), p, 8, CPU)


def test_voc(tmp_path):
    at = tmp_path / "VOCdevkit/VOC2012"
    for name, split, value in (("a", "train", 20), ("b", "val", 255)):
        save(at / f"JPEGImages/{name}.jpg", 7, "RGB")
        save(at / f"SegmentationClass/{name}.png", value)
        (at / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (at / f"ImageSets/Segmentation/{split}.txt").write_text(name + "\n")
    first, second = opened("voc", tmp_path)
    assert len(first) == len(second) == 1 and len(first.classes) == 21 and first.classes[20] == "tvmonitor"
    assert first[0]["mask"].unique().tolist() == [20] and second[0]["mask"].unique().tolist() == [255]


def test_ade20k_drops_class_0(tmp_path):
    at = tmp_path / "ADEChallengeData2016"
    rows = torch.tensor([0, 1, 150, 2]).repeat_interleave(4)[:, None].expand(16, 16)
    for split in ("training", "validation"):
        save(at / f"images/{split}/x.jpg", 7, "RGB")
        save(at / f"annotations/{split}/x.png", rows)
    item = opened("ade20k", tmp_path)[1][0]
    assert item["mask"][::4, 0].tolist() == [255, 0, 149, 1]
    assert PROTOCOLS["ade20k"].window == 512 and len(opened("ade20k", tmp_path)[0].classes) == 150


def test_cityscapes_train_ids(tmp_path):
    rows = torch.tensor([0, 7, 26, 33]).repeat_interleave(4)[:, None].expand(16, 16)
    for split in ("train", "val"):
        save(tmp_path / f"leftImg8bit/{split}/town/town_0_leftImg8bit.png", 7, "RGB")
        save(tmp_path / f"gtFine/{split}/town/town_0_gtFine_labelIds.png", rows)
    data = opened("cityscapes", tmp_path)[0]
    assert data[0]["mask"][::4, 0].tolist() == [255, 0, 13, 18]  # unlabelled, road, car, bicycle
    assert data.classes[0] == "road" and data.classes[13] == "car" and len(data.classes) == 19


def nyu_tree(at):
    for name in ("train", "test"):
        save(at / name / "rgb.jpg", 7, "RGB", (480, 640))
        depth = torch.full((480, 640), 2500)
        depth[:, 320:], depth[100] = 12_000, 0
        save(at / name / "depth.png", depth, "I;16")
        (at / f"nyu_{name}.txt").write_text(f"/{name}/rgb.jpg /{name}/depth.png 518.8\n/{name}/rgb.jpg None 518.8\n")


def test_nyu_is_in_metres_to_ten_in_eigens_crop(tmp_path):
    nyu_tree(tmp_path)
    first, test = opened("nyu", tmp_path)
    assert len(first) == len(test) == 1 and first.max_depth == 10
    depth = first[0]["depth"]
    assert depth[0, 0] == 2.5 and depth[0, 320] == 0 and depth[100, 0] == 0
    valid = test[0]["depth"] > 0
    rows, columns = valid.any(1).nonzero()[:, 0].tolist(), valid.any(0).nonzero()[:, 0].tolist()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 319) and 100 not in rows
    assert opened("nyu", tmp_path, image_size=240)[0][0]["image"].shape == (3, 240, 320)


def test_kitti_is_cropped_and_scaled_by_256(tmp_path):
    for name in ("train", "test"):
        save(tmp_path / f"input/d/{name}.png", torch.arange(375)[:, None].expand(375, 1242) % 200, "RGB")
        save(tmp_path / f"gt_depth/e/{name}.png", 256 * 10, "I;16", (375, 1242))
        (tmp_path / f"kitti_eigen_{name}.txt").write_text(f"d/{name}.png e/{name}.png 721.5\nd/{name}.png None 721.5\n")
    first, test = opened("kitti", tmp_path)
    item = first[0]
    assert item["depth"].shape == (352, 1216) and item["image"].shape == (3, 352, 1216) and item["depth"].unique() == 10
    assert item["image"][0, 0, 0] == 23  # rows from the bottom
    valid = test[0]["depth"] > 0
    rows, columns = valid.any(1).nonzero()[:, 0], valid.any(0).nonzero()[:, 0]
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (143, 349, 43, 1172) and first.max_depth == 80


def test_sunrgbd_turns_bits_back_cuts_at_8_m_and_learns_on_nyu(tmp_path):
    nyu_tree(tmp_path / "nyu")
    lines = ""
    for name, size, mm in (("a", (480, 640), 3000), ("b", (530, 730), 9000)):
        save(tmp_path / f"SUNRGBD/SUNRGBD/kv1/image/{name}.jpg", 7, "RGB", size)
        save(tmp_path / f"SUNRGBD/SUNRGBD/kv1/depth/{name}.png", (mm << 3 | mm >> 13) & 0xFFFF, "I;16", size)
        lines += f"SUNRGBD/kv1/image/{name}.jpg SUNRGBD/kv1/depth/{name}.png\n"
    (tmp_path / "SUNRGBD/SUNRGBD_val_splits.txt").write_text(lines)
    first, test = opened("sunrgbd", tmp_path)
    assert first[0]["depth"].shape == (480, 640) and first.max_depth == 10
    for i, metres in enumerate((3.0, 8.0)):
        valid = test[i]["depth"][45:471, 41:601]
        assert valid.unique().item() == pytest.approx(metres) and (test[i]["depth"] > 0).sum() == valid.numel()
    p = replace(PROTOCOLS["sunrgbd"], image_size=64, iterations=2, batch_size=2, lr=(1e-3,))
    result, stats, _ = eval_dense.evaluate(Oracle(), "sunrgbd", str(tmp_path), p)  # of two sizes
    assert len(stats["rmse"]) == 2 and math.isfinite(result["rmse"])


def test_imagefolder_and_its_two_tasks(tmp_path):
    for split, n in (("train", 20), ("val", 6)):
        for c in range(2):
            for i in range(n):
                save(tmp_path / f"{split}/c{c}/{i}.jpg", 100 * c + 50, "RGB", (40, 30 + i))
    first, _ = opened("imagefolder", tmp_path, image_size=16)
    assert first[0]["image"].shape == (3, 16, 16) and first.labels == ("c0", "c1") and len(first) == 40
    p = replace(PROTOCOLS["imagefolder"], image_size=16)
    result = eval_dense.evaluate(Oracle(), "imagefolder", str(tmp_path), p)[0]
    assert result["linear"] == 100 and result["knn"] == 100 and "miou" not in result
    with pytest.raises(ValueError, match="--image-size 0: imagefolder cuts all pictures to one side"):
        opened("imagefolder", tmp_path)
    (tmp_path / "val/c1").rename(tmp_path / "val/c2")
    with pytest.raises(ValueError, match="have other classes"):
        opened("imagefolder", tmp_path, image_size=16)


def test_pairs_and_random_crops(tmp_path):
    first, test = opened("pairs", tree(tmp_path / "t"))
    item = first[3]
    assert item["mask"][:2].unique().tolist() == [255] and item["depth"][:2].max() == 0
    assert torch.equal(item["image"][0][2:], 50 * item["mask"][2:]) and len(first) == 24 and len(test) == 8
    torch.testing.assert_close(item["depth"][2:], item["mask"][2:] + 1.0)
    assert first.max_depth == test.max_depth == 4
    (tmp_path / "t/classes.txt").write_text("# id name\n0\tred\n1\tblue\n2\tgreen\n3\tgrey\n4\tblack\n")
    assert opened("pairs", tmp_path / "t")[0].classes == ("red", "blue", "green", "grey", "black")
    only = opened("pairs", tree(tmp_path / "u", kinds=("masks",)), crop=40)[0]
    seen = [only[0, torch.rand(4, generator=torch.Generator().manual_seed(s)).tolist()] for s in range(20)]
    for crop in seen:
        assert crop["image"].shape == (3, 40, 40) and crop["mask"].shape == (40, 40)
        inside = crop["mask"] != 255  # the two go together, but for the blur at edges
        assert ((crop["image"][0].float() / 50 - crop["mask"]).abs()[inside] < 0.5).float().mean() > 0.85
    assert any((c["mask"][-1] == 255).all() for c in seen) and len({c["image"].float().mean().item() for c in seen}) > 15


@pytest.mark.parametrize("data", sorted(eval_dense.OPEN))
def test_a_missing_set_says_what_is_wanted_and_where_it_is_had(tmp_path, data):
    with pytest.raises(ValueError, match=f"--data {data} wants in --root {tmp_path}: ") as caught:
        opened(data, tmp_path)
    assert "\n" not in str(caught.value) and eval_dense.OPEN[data].__doc__.split()[0] in str(caught.value)
    with pytest.raises(ValueError, match="wants in --root nowhere"):
        opened(data, "nowhere")


def broken(at, what):
    file = {"mask": at / "masks/val/1.png", "depth": at / "depth/val/1.png"}.get(what, at / "images/val/1.png")
    if what == "no mask":
        (at / "masks/train/3.png").unlink()
    elif what == "beyond":
        save(at / "masks/val/1.png", 9, size=(32, 48))
    elif what == "rgb":
        save(at / "masks/val/1.png", 9, "RGB", (32, 48))
    elif what == "8 bit depth":
        save(at / "depth/train/0.png", 9, size=(32, 48))
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:50])
    elif what == "no depth":
        for i in range(8):
            save(at / f"depth/val/{i}.png", 0, "I;16", (32, 48))
    elif what == "mask size":
        save(at / "masks/val/1.png", 1, size=(16, 48))
    elif what == "sizes":
        for kind, mode in (("images", "RGB"), ("masks", "L"), ("depth", "I;16")):
            save(at / f"{kind}/train/5.png", 1, mode, (48, 48))
    elif what == "empty":
        for f in (at / "images/val").iterdir():
            f.unlink()


@pytest.mark.parametrize("what, words", [
    ("no mask", "1 of 72 files are missing, as .*masks/train/3.png"),
    ("beyond", "masks/val/1.png has class 9, but the set has only 4"), ("rgb", "masks/val/1.png must be an 8-bit index PNG, but its mode is RGB"),
    ("8 bit depth", "depth/train/0.png must be a 16-bit grey PNG"), ("truncated", "cannot read .*images/val/1.png"),
    ("no depth", "no picture has valid depth.*depth/val/0.png"), ("mask size", "masks/val/1.png has .16, 48. pixels"),
    ("sizes", r"images/train/5.png|several sizes"), ("empty", "no picture in split val")])
def test_bad_data_is_one_line_that_names_the_file(tmp_path, monkeypatch, what, words):
    workers = int(what == "truncated")  # one with: it makes no difference, and takes five seconds to leave
    at = tree(tmp_path / "t")
    broken(at, what)
    monkeypatch.setattr(clsspec, "load", lambda *a: Oracle())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        eval_dense.main(["x", "--data", "pairs", "--root", str(at), "--iterations", "2", "--workers", str(workers)])
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    assert re.search(words, message), message
    assert not Path("runs").exists()  # no folder for results that never came


def test_pictures_of_several_sizes_are_fine_with_crops(tmp_path):
    at = tree(tmp_path / "t")
    for kind, mode in (("images", "RGB"), ("masks", "L"), ("depth", "I;16")):
        for split in ("train", "val"):
            save(at / f"{kind}/{split}/5.png", 1, mode, (56, 40))
    result, stats, _ = eval_dense.evaluate(Oracle(), "pairs", str(at), replace(SHORT, crop=32, window=32, iterations=20))
    assert stats["counts"][5].sum() == 56 * 40 and result["protocol"]["test"] == 8
