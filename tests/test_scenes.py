"""The embedded world against a naive ray-caster."""

import math

import pytest
import torch
from PIL import Image

import scenes
from scenes import CLASSES, SPLITS, Scenes

F64 = torch.float64


def trace(o, d, surfaces):
    """(slot, t) of the first surface on one ray o + t d, by naive float64 arithmetic on one scene.

    surfaces: (17, 8), as `Scenes.design` makes them for one scene. Slots: 0 sky, 1 ground, 2-7 objects.
    """
    best = (0, math.inf) if d[1] >= 0 else (1, -o[1] / d[1])
    for slot in range(2, 8):
        x, y, z, cos, sin, a, b, c = surfaces[1:9, slot].tolist()

        def own(v):                        # world -> the object's frame, turned about the upright axis
            return v[0] * cos - v[2] * sin, v[1], v[0] * sin + v[2] * cos

        p, e, times = own((o[0] - x, o[1] - y, o[2] - z)), own(d), []
        inside = lambda t, i, h: abs(p[i] + t * e[i]) <= h + 1e-9
        if slot < 4:                       # an ellipsoid: A t^2 + 2 H t + C = 0
            A = sum((e[i] / h) ** 2 for i, h in enumerate((a, b, c)))
            H = sum(p[i] * e[i] / h ** 2 for i, h in enumerate((a, b, c)))
            C = sum((p[i] / h) ** 2 for i, h in enumerate((a, b, c))) - 1
            if H * H > A * C:
                times.append((-H - math.sqrt(H * H - A * C)) / A)
        elif slot < 6:                     # six faces, each a plane and two bounds
            for i, h in enumerate((a, b, c)):
                for side in (-h, h):
                    t = (side - p[i]) / e[i]
                    if all(inside(t, j, (a, b, c)[j]) for j in range(3) if j != i):
                        times.append(t)
        else:                              # a side between two heights, and two round caps
            A = e[0] ** 2 + e[2] ** 2
            H = p[0] * e[0] + p[2] * e[2]
            root = H * H - A * (p[0] ** 2 + p[2] ** 2 - a * a)
            if root > 0:
                t = (-H - math.sqrt(root)) / A
                times += [t] if inside(t, 1, b) else []
            for side in (-b, b):
                t = (side - p[1]) / e[1]
                times += [t] if math.hypot(p[0] + t * e[0], p[2] + t * e[2]) <= a else []
        for t in times:
            if 0 < t < best[1]:
                best = (slot, t)
    return best


def rays(scene, size):
    """Direction of each pixel of one scene, by rotation matrices in float64: {(row, column): (x, y, z)}."""
    tan, pitch, roll = (scene[k].item() for k in ("tan", "pitch", "roll"))
    R = torch.tensor([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]], dtype=F64)
    P = torch.tensor([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)],
                      [0, math.sin(pitch), math.cos(pitch)]], dtype=F64)
    centre = lambda k: (2 * k + 1) / size - 1
    return {(i, j): (P @ R @ torch.tensor([tan * centre(j), -tan * centre(i), 1.0], dtype=F64)).tolist()
            for i in range(size) for j in range(size)}


@pytest.mark.parametrize("shape", ["sphere", "box", "cylinder"])
def test_mask_and_depth_equal_a_naive_loop(shape):
    world, first = Scenes("test", size=24), 2 * Scenes.span
    wanted = dict(sphere=(0, 1), box=(2, 3), cylinder=(4, 5))[shape]
    number = next(i for i, l in enumerate(world(torch.arange(40))["label"].tolist()) if l in wanted)
    scene, surfaces = world.design(torch.tensor([first + number]))
    out, far = world(torch.tensor([number])), 0
    eye = (0.0, scene["height"].item(), 0.0)
    for (i, j), d in rays(scene, 24).items():
        slot, t = trace(eye, d, surfaces[:, 0].double())
        depth = t if slot and t <= world.max_depth else 0.0
        same = int(surfaces[0, 0, slot]) == out["mask"][0, i, j].item()
        if not (same and math.isclose(depth, out["depth"][0, i, j].item(), rel_tol=1e-4)):
            far += 1                       # only a ray that grazes an edge may fall on its other side
    assert far <= 1
    assert (out["mask"] == 4 + out["label"]).any()


def test_scene_is_a_function_of_its_number():
    world = Scenes("train", size=32)
    batch = world(torch.arange(100))
    again, alone = world(torch.arange(100)), [world(torch.tensor([i])) for i in (0, 7, 63, 64, 99)]
    mixed = world(torch.tensor([99, 3, 64]))
    for k in batch:
        assert torch.equal(batch[k], again[k])
        assert torch.equal(batch[k][[99, 3, 64]], mixed[k])
        assert torch.equal(batch[k][[0, 7, 63, 64, 99]], torch.cat([a[k] for a in alone]))


def test_splits_seeds_and_numbers_make_different_scenes():
    i = torch.arange(50)
    pictures = [Scenes(s, 32, seed)(i)["image"] for s in SPLITS for seed in (0, 1)]
    assert len(torch.cat(pictures).flatten(1).unique(dim=0)) == 8 * 50


def test_types_ranges_and_label():
    world = Scenes("probe", size=64)
    out = world(torch.arange(200))
    B, S = 200, 64
    assert out["image"].shape == (B, 3, S, S) and out["image"].dtype == torch.uint8
    assert out["mask"].shape == (B, S, S) and out["mask"].dtype == torch.uint8 and out["mask"].max() == 9
    assert out["depth"].shape == (B, S, S) and out["depth"].dtype == torch.float32
    assert out["label"].shape == (B,) and out["label"].dtype == torch.int64
    depth, mask, label = out["depth"], out["mask"], out["label"]
    assert depth.isfinite().all() and depth.min() == 0 and depth.max() <= world.max_depth
    assert (depth[mask == 0] == 0).all() and (depth[mask > 3] > 0).all() and depth[depth > 0].min() > 0.5
    # The main object is the one with the least far centre, and it is always in the picture.
    _, surfaces = world.design(torch.arange(200) + Scenes.span)
    classes, y, z = surfaces[0, :, 2:], surfaces[2, :, 2:], surfaces[3, :, 2:]
    z = torch.where(y > -99, z, math.inf)
    assert torch.equal(classes.gather(1, z.argmin(1, keepdim=True))[:, 0].long() - 4, label)
    assert ((mask == (4 + label)[:, None, None]).flatten(1).sum(1) >= 40).all()
    # Every class is common, no picture is black, flat, or of one class only.
    assert (torch.bincount(mask.flatten().long(), minlength=10) / mask.numel() > 0.02).all()
    assert (torch.bincount(label, minlength=6) > 200 / 6 / 2).all()
    picture = out["image"].float().flatten(1)
    assert picture.mean(1).min() > 30 and picture.std(1).min() > 8
    most = torch.stack([(mask == c).flatten(1).float().mean(1) for c in range(10)]).amax(0)
    assert most.max() < 0.85
    assert world.classes == CLASSES and len(world.classes) == 10 and len(world.labels) == 6


def test_ground_depth_is_height_over_slope():
    world, n = Scenes("train", size=16), torch.arange(20)
    scene, _ = world.design(n)
    out = world(n)
    for b in range(20):
        one = {k: v[..., b] for k, v in scene.items()}
        for (i, j), d in rays(one, 16).items():
            if 1 <= out["mask"][b, i, j] <= 3 and out["depth"][b, i, j] > 0:
                assert math.isclose(out["depth"][b, i, j], -one["height"].item() / d[1], rel_tol=1e-4)


def test_the_same_scene_at_another_size():
    """At three times the size, the middle of each 3 x 3 block is the small picture's pixel."""
    small, large = (Scenes("test", s)(torch.arange(8)) for s in (32, 96))
    same = small["mask"] == large["mask"][:, 1::3, 1::3]
    assert same.float().mean() > 0.999
    assert torch.allclose(small["depth"][same], large["depth"][:, 1::3, 1::3][same], rtol=1e-3)
    assert torch.equal(small["label"], large["label"])


def test_objects_stand_apart_and_away_from_the_camera():
    _, surfaces = Scenes().design(torch.arange(500))
    x, y, z, a, c = (surfaces[i, :, 2:] for i in (1, 2, 3, 6, 8))
    there, r = y > -99, torch.hypot(a, c) * torch.where(torch.arange(6) // 2 == 1, 1, 0.5 ** 0.5)
    gap = torch.hypot(x[:, :, None] - x[:, None], z[:, :, None] - z[:, None]) - r[:, :, None] - r[:, None]
    pair = there[:, :, None] & there[:, None] & ~torch.eye(6).bool()
    assert gap[pair].min() > 0 and (torch.hypot(x, z) - r)[there].min() > 0.5
    assert set(there.sum(1).tolist()) == {3, 4, 5, 6}


def test_errors():
    with pytest.raises(ValueError, match="split must be one of train, probe, test, val; got 'dev'"):
        Scenes("dev")
    for bad in (-1, Scenes.span):
        with pytest.raises(ValueError, match=f"got {bad}"):
            Scenes()(torch.tensor([0, bad]))


# --- sheets ------------------------------------------------------------------------------------------


def test_colours_of_classes_and_depth():
    tile = scenes.paint_classes(torch.tensor([[0, 1], [9, 255]]), 10)
    assert tile.shape == (3, 2, 2) and (tile[:, 1, 1] == 0).all()  # ignored: black
    assert len({tuple(c) for c in tile.flatten(1).T.tolist()}) == 4
    near, far, none = scenes.paint_depth(torch.tensor([[0.01, 20.0, 0.0]]), 20.0)[:, 0].T
    torch.testing.assert_close(near, scenes.DEPTH_COLOURS[0], atol=1e-2, rtol=0)
    torch.testing.assert_close(far, scenes.DEPTH_COLOURS[-1], atol=1e-2, rtol=0)
    assert (none == 0).all()
    assert (scenes.paint_depth(torch.zeros(2, 2), 0.0) == 0).all()  # no picture has a depth


def test_a_sheet_has_its_tiles_titles_and_legends(tmp_path, monkeypatch):
    rows = {"picture": [torch.ones(3, 8, 8) * torch.tensor([1.0, 0, 0])[:, None, None]] * 3,
            "true depth": [torch.zeros(3, 8, 16)]}
    words = []
    real = scenes.ImageDraw.ImageDraw.text
    monkeypatch.setattr(scenes.ImageDraw.ImageDraw, "text", lambda self, at, word, *rest: words.append(word) or real(self, at, word, *rest))
    scenes.sheet(tmp_path / "a.png", rows, ("sky", "grass"), 7.5, side=32)
    assert words == ["picture", "true", "depth", "sky", "grass", "0 m", "7.5 m; black: no depth"]
    with Image.open(tmp_path / "a.png") as page:
        assert page.getpixel((96 + 16, 4 + 16)) == (255, 0, 0) and page.getpixel((96 + 16, 40 + 16)) == (0, 0, 0)


def test_the_command_draws_the_world(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.sys, "argv", ["scenes.py", str(tmp_path / "sheet.png")])
    scenes.main()
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.width > 8 * 112 and len(page.getcolors(1 << 20)) > 1000
    monkeypatch.setattr(scenes.sys, "argv", ["scenes.py"])
    with pytest.raises(SystemExit, match="python scenes.py scenes.png"):
        scenes.main()
