"""Scenes, a small world made by formula, with the class and the depth of every pixel known exactly.

    python scenes.py scenes.png          # a sheet of eight scenes: picture, classes, depth

Balls, bushes, crates, houses, drums and trunks stand under a sky; one ray a pixel finds the nearest
surface, which is shaded once. Scene i is a function of (seed, split, i) alone, so a training set
takes no disk, and a test set can be made again anywhere, on a CPU to the last bit.

It is made so that colour alone names nothing: a material comes in three paints whose mean is grey,
so a linear probe of raw colours stays near chance, and a network must know shape or texture.
"""

import math
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

SPLITS = ("train", "probe", "test", "val")
CLASSES = "sky", "grass", "sand", "paving", "ball", "bush", "crate", "house", "drum", "trunk"
# Materials. Each comes in three paints, whose hues are a third of a circle apart, and between those
# of other materials. Their mean is grey, so the mean colour has no hue that names a class (its
# brightness differs a little, .43 to .67); shape and texture do, or knowing the paints. Hue, in
# turns, is the first paint's. Half widths and periods are in metres, for an object 4 m away; aspect
# is height by width.
KINDS = torch.tensor([
    # half  lo, hi   aspect lo, hi   period   hue     sat  value
    [0.50, 0.80,     1.00, 1.00,     0.72,    3 / 18, 0.66, 0.86],   # ball: dots
    [0.58, 0.95,     0.75, 1.05,     0.90,    5 / 18, 0.58, 0.64],   # bush: leaves
    [0.46, 0.72,     0.75, 1.10,     0.44,    2 / 18, 0.56, 0.80],   # crate: slanted planks
    [0.62, 0.92,     1.00, 1.45,     0.62,    0 / 18, 0.54, 0.76],   # house: bricks
    [0.40, 0.60,     1.10, 1.50,     0.46,    4 / 18, 0.62, 0.78],   # drum: rings
    [0.27, 0.40,     3.00, 4.20,     0.28,    1 / 18, 0.48, 0.66]])  # trunk: upright grain
GROUNDS = torch.tensor([
    # period  hue    sat
    [0.9,     2 / 9, 0.40],    # grass
    [0.8,     1 / 9, 0.36],    # sand, in ripples
    [1.7,     0 / 9, 0.28]])   # paving, a checkerboard
# RGB of horizon, zenith, sunlight, and light from all around; a scene mixes the three.
MOODS = torch.tensor([
    [.74, .86, .95,   .24, .47, .84,   .82, .77, .66,   .40, .45, .54],   # clear day
    [.98, .64, .42,   .27, .25, .50,   .88, .68, .56,   .44, .41, .47],   # dusk
    [.83, .85, .87,   .58, .62, .68,   .38, .38, .38,   .62, .64, .67]])  # overcast


def scramble(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, any shape: products wrap around, shifts are logical."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ (z >> 31 & (1 << 33) - 1)


def uniforms(seed: int, index: Tensor, n: int) -> Tensor:
    """(B,) int64 -> (B, n) float64 in [0, 1), each a function of (seed, index, column) alone."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    key = scramble(scramble(torch.full_like(index, seed) + golden) ^ index)
    z = scramble(key[:, None] + golden * torch.arange(1, n + 1))
    return (z >> 11 & (1 << 53) - 1).double() / (1 << 53)


def hsv(hue: Tensor, sat: Tensor, value: Tensor) -> Tensor:
    """Hue in turns, saturation and value in [0, 1], each (...) -> RGB (3, ...) in [0, 1]."""
    k = torch.stack([(hue * 6 + n) % 6 for n in (5, 3, 1)])
    return value * (1 - sat * torch.minimum(k, 4 - k).clamp(0, 1))


def turn(v, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Turn the vectors v (three tensors: x, y, z) about the upright axis; -sin turns them back."""
    return [v[0] * cos - v[2] * sin, v[1], v[0] * sin + v[2] * cos]


def crossings(o, d, surfaces: Tensor) -> tuple[Tensor, Tensor]:
    """The t at which rays o + t d enter each of the six objects, and whether they do: (B, 6, S, S).

    o, d: x, y, z of origin and direction, each broadcastable to (B, 1, S, S). In its own frame, in
    units of its half sizes, an object is the unit sphere, a cube (where three slabs overlap) or a
    cylinder (a slab and a column), so a ray is inside it for an interval of t, maybe an empty one.
    """
    x, y, z, cos, sin, *half_sizes = surfaces[1:9, :, 2:, None, None]
    o = [p / h for p, h in zip(turn([o[0] - x, o[1] - y, o[2] - z], cos, sin), half_sizes)]
    d = [p / h for p, h in zip(turn(d, cos, sin), half_sizes)]

    def slab(i, k):                      # |o_i + t d_i| < 1, for the objects k
        middle, half = -o[i][:, k] / d[i][:, k], 1 / d[i][:, k].abs()
        return middle - half, middle + half

    def round_solid(axes, k):            # sum of (o_i + t d_i)^2 < 1; a miss is NaN, so False below
        dd = sum(d[i][:, k] ** 2 for i in axes)
        middle = -sum(o[i][:, k] * d[i][:, k] for i in axes) / dd
        half = (middle ** 2 - (sum(o[i][:, k] ** 2 for i in axes) - 1) / dd).sqrt()
        return middle - half, middle + half

    def shared(p, q):
        return torch.maximum(p[0], q[0]), torch.minimum(p[1], q[1])

    ball, box, can = slice(0, 2), slice(2, 4), slice(4, 6)
    parts = (round_solid((0, 1, 2), ball), shared(shared(slab(0, box), slab(1, box)), slab(2, box)),
             shared(round_solid((0, 2), can), slab(1, can)))
    enter, leave = (torch.cat(p, 1) for p in zip(*parts))
    return enter, (enter < leave) & (enter > 0)


class Scenes:
    """Scenes(split, size S, seed)(index), index (B,) int64 on any device, renders there and returns
      image: uint8 (B, 3, S, S), RGB
      mask:  uint8 (B, S, S), positions in `classes`
      depth: float32 (B, S, S), metres along the optical axis; 0 = not valid (sky, beyond max_depth)
      label: int64 (B,), position in `labels`: the kind of the main object, whose centre has the
             least depth, near the middle of the picture; the six kinds are equally likely
    Scene i is a function of (seed, split, i) alone; S only says how finely it is sampled. Splits
    are disjoint ranges of 2^40 numbers in one hash. World: x right, y up, z ahead, in metres.
    Raises ValueError for an unknown split or a number outside [0, 2^40).
    """
    classes, labels, max_depth, span = CLASSES, CLASSES[4:], 20.0, 1 << 40

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        self.split, self.size, self.seed = split, size, seed

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        if len(bad := index[(index < 0) | (index >= self.span)]):
            raise ValueError(f"scene numbers must be in [0, 2^40); got {bad[0].item()}")
        pixels = 1 << (16 if index.device.type == "cpu" else 22)       # at a time: little memory
        parts = []
        for part in index.split(max(1, pixels // self.size ** 2)):
            scene, surfaces = self.design(part.cpu() + SPLITS.index(self.split) * self.span)
            scene = {k: v.to(index.device) for k, v in scene.items()}
            parts.append(self.render(scene, surfaces.to(index.device)))
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def design(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B,) -> a scene's own numbers, (..., B) each, and its eight surfaces, (17, B, 8).

        On the CPU and in float64 up to the last step, so no batch or device rounds differently.
        Each pick and draw takes the next column of random numbers: to add one changes all scenes.
        """
        u = uniforms(self.seed, index, 24 + 6 * 17)  # 24 of a scene (2 spare), 17 of each object
        one, each = iter(u[:, :24].unbind(1)), iter(u[:, 24:].unflatten(1, (6, 17)).unbind(2))
        pick = lambda low, high: low + (high - low) * next(one)           # (B,), for a scene
        draw = lambda low, high: low + (high - low) * next(each)          # (B, 6), for its objects
        # Camera: tangent of half the field of view; pitch, by the horizon's height in the picture.
        tan = pick(0.40, 0.56)
        pitch, roll, height = (tan * pick(0.05, 0.55)).atan(), pick(-0.1, 0.1), pick(0.8, 2.5)
        # Light: a mixture of moods, and the direction of the sun.
        mood = torch.stack([pick(0.1, 1) ** 3 for _ in MOODS])
        mood = (mood / mood.sum(0))[:, None] * MOODS[..., None]
        horizon, zenith, sun, shade = mood.sum(0).unflatten(0, (4, 3))    # (3, B) each
        rise = pick(0.45, 1.05)
        light = turn([rise.cos(), rise.sin(), 0 * rise], *((w := pick(0, math.tau)).cos(), w.sin()))

        # Objects: two spheres, two boxes, two cylinders; each shape has two kinds. 3 to 6 exist, in
        # a random order from near to far. The first, the main one, stands near the middle.
        kind = torch.tensor([0, 0, 2, 2, 4, 4]) + draw(0, 2).long()
        order, column = (draw(0, 1).argsort(1).argsort(1) for _ in range(2))
        count = pick(3, 7).long()[:, None]
        # From a little beyond where the picture's lower edge meets the ground.
        near = (1.1 * height / (pitch + tan.atan()).tan()).clamp(min=2.6)[:, None]
        z = near + (13 - near) * (order + draw(0, 0.6)) / count
        x = torch.where(order == 0, draw(-0.4, 0.4), (column + draw(0, 1)) / 3 - 1)
        x = x * z * tan[:, None]
        wide, wider, low, high, period, hue, sat, value = KINDS[kind].unbind(2)
        # Far ones are larger, so that they can be seen; a half width is at most a third of the gap
        # to a neighbour, as a box's corner is 1.5 half widths out.
        there, grow = order < count, (z / 4) ** 0.65
        gap = ((x[:, :, None] - x[:, None]) ** 2 + (z[:, :, None] - z[:, None]) ** 2).sqrt()
        apart = there[:, :, None] & there[:, None] & ~torch.eye(6).bool()
        a = torch.minimum(grow * draw(wide, wider), torch.where(apart, gap, 99).amin(2) / 3)
        box = kind // 2 == 1
        b, c = a * draw(low, high), a * torch.where(box, draw(0.8, 1.1), 1)
        # Balls and bushes sink into the ground a little; what is absent is deep down.
        y = torch.where(there, torch.where(kind < 2, 0.88, 1) * b, -999)
        k = math.tau / (period * grow * draw(0.85, 1.15))              # radians per metre
        k = torch.where(box, k, (k * a).round().clamp(min=3) / a)              # whole turns around
        paint = draw(0, 3).floor() / 3 + draw(-0.015, 0.015)
        first = hsv(hue + paint, sat * draw(0.9, 1.1), value * draw(0.9, 1.1))
        w = draw(0, math.tau)
        objects = [kind + 4, x, y, z, w.cos(), w.sin(), a, b, c, k, draw(0, 9), *first,
                   *(first * draw(0.4, 0.6))]

        # Surfaces, in columns: sky (a ceiling of clouds, 1 km up), ground, objects. In rows: class,
        # centre, yaw (cos, sin), half sizes, texture (radians per metre, phase), two RGB colours.
        soil = pick(0, 3).long()
        period, hue, sat = GROUNDS[soil].unbind(1)
        paint = pick(0, 3).floor() / 3 + pick(-0.02, 0.02)
        first = hsv(hue + paint, sat * pick(0.9, 1.1), pick(0.68, 0.84))
        surfaces = torch.zeros(17, len(index), 8)
        surfaces[[4, 6, 7, 8]], surfaces[0, :, 1] = 1, 1.0 + soil
        surfaces[9:, :, 0] = torch.stack([pick(0.003, 0.005), pick(0, 99), *horizon, *zenith])
        surfaces[9:, :, 1] = torch.stack([math.tau / period / pick(0.8, 1.3), pick(0, 9), *first,
                                          *(first * pick(0.55, 0.8))])
        surfaces[:, :, 2:] = torch.stack(objects)
        label = kind.gather(1, order.argmin(1, keepdim=True))[:, 0]
        scene = dict(tan=tan, pitch=pitch, roll=roll, height=height, light=torch.stack(light),
                     sun=sun, shade=shade, horizon=horizon, clouds=pick(-1.2, 1.2),
                     haze=pick(0.03, 0.08))
        return {k: v.float() for k, v in scene.items()} | dict(label=label), surfaces

    def render(self, scene: dict[str, Tensor], surfaces: Tensor) -> dict[str, Tensor]:
        """One ray a pixel: the nearest surface gives mask and depth, and is shaded once."""
        s = {k: v[..., None, None] for k, v in scene.items()}            # (B, 1, 1) or (3, B, 1, 1)
        # Rays go one metre forward per unit of t, so t is depth along the optical axis.
        grid = (torch.arange(self.size, device=surfaces.device) + 0.5) * 2 / self.size - 1
        right, up = grid * s["tan"], -grid[:, None] * s["tan"]
        cos, sin = s["roll"].cos(), s["roll"].sin()
        right, up = right * cos - up * sin, right * sin + up * cos
        cos, sin = s["pitch"].cos(), s["pitch"].sin()
        d = torch.stack([right, up * cos - sin, up * sin + cos])         # (3, B, S, S)
        eye = torch.stack([0 * s["height"], s["height"], 0 * s["height"]])
        enter, hit = crossings(eye[:, :, None], d[:, :, None], surfaces)
        t, slot = torch.cat([torch.where(d[1] >= 0, 1e3 / (d[1] + 0.1), math.inf)[:, None],
                             torch.where(d[1] < 0, -eye[1] / d[1], math.inf)[:, None],
                             torch.where(hit, enter, math.inf)], 1).min(1)
        # The nearest surface's numbers, all (B, S, S); the point that is hit, in the world, in the
        # surface's frame, and in half sizes; then the normal.
        row = 8 * torch.arange(len(slot), device=slot.device)[:, None, None]
        mask, x, y, z, cos, sin, a, b, c, k, phase, *colours = surfaces.flatten(1)[:, slot + row]
        mask = mask.long()
        sky, flat, ball, box, can = (mask == 0, mask < 4, *(mask // 2 == i for i in (2, 3, 4)))
        point = eye + t * d
        own = turn([point[0] - x, point[1] - y, point[2] - z], cos, sin)
        q = own[0] / a, own[1] / b, own[2] / c
        ax, ay, az = (v.abs() for v in q)
        ring = (q[0] ** 2 + q[2] ** 2).sqrt()
        top = flat | box & (ay > ax) & (ay > az) | can & (ay > ring)
        side = box & (ax > az)                                           # the x face, else z
        n = torch.stack([q[0] / a * ~(top | box & ~side), torch.where(top, 1, q[1] / b * ball),
                         q[2] / c * ~(top | side)])
        n = torch.stack(turn(n / (n ** 2).sum(0).sqrt(), cos, -sin))

        # Texture: every class its own pattern of u and v, in [-1, 1]; the ground's blurs far away.
        u = torch.where(side, own[2], own[0])
        u = torch.where(ball | can, torch.atan2(q[0], q[2]) * a, u) * k
        v = torch.where(top, torch.where(can, ring * a, own[2]), own[1]) * k + phase
        crisp = lambda wave: (4 * wave).clamp(-1, 1)
        sin, cos = torch.sin, torch.cos
        rough = (sin(u + phase + 2 * sin(0.8 * v)) * sin(v + 2 * sin(0.7 * u))
                 + 0.7 * sin(2.3 * u - 2 * sin(1.7 * v)) * sin(2.1 * v + sin(1.9 * u)))
        frame = torch.maximum(torch.where(side, az, ax), torch.where(top, az, ay)) > 0.8
        joint = torch.maximum(cos(2 * v), cos(u + math.pi * (v / math.pi).floor()))
        tone = torch.stack([
            rough,                                                       # sky: clouds
            rough,                                                       # grass
            sin(v + 2 * sin(0.4 * u)),                                   # sand
            crisp(sin(u) * sin(v)),                                      # paving
            crisp(cos(u) * cos(v) - 0.25),                               # ball: dots
            crisp(rough),                                                # bush: leaves
            torch.where(frame, -0.5, crisp(cos(u + v) + 0.5)),           # crate: planks in a frame
            crisp(0.8 - joint),                                          # house: bricks
            crisp(sin(v)),                                               # drum: rings
            sin(u + sin(0.3 * v + 2 * sin(0.5 * u))),                    # trunk: grain
        ]).gather(0, mask[None])[0]
        blur = torch.where(flat, 1 / (1 + (k * t ** 2 / (90 * s["height"])) ** 2), 1)

        # Light: some from all around, and the sun where no object is in its way; then haze.
        _, hit = crossings((point + 0.004 * t * n)[:, :, None], s["light"][:, :, None], surfaces)
        facing = (n * s["light"]).sum(0).clamp(min=0) * ~hit.any(1)
        first, second = torch.stack(colours).unflatten(0, (2, 3))        # each (3, B, S, S)
        lit = torch.lerp(second, first, 0.5 + 0.5 * tone * blur)
        lit = lit * (s["shade"] * (0.8 + 0.2 * n[1]) + s["sun"] * facing)
        lit = torch.lerp(s["horizon"], lit, torch.exp(-s["haze"] * t))
        air = torch.lerp(first, second, (d[1] / (0.15 + d[1].abs())).clamp(0, 1))
        air = torch.lerp(air, 0.4 + 0.6 * s["horizon"], (0.6 * (rough + s["clouds"])).clamp(0, 0.8))
        image = (torch.where(sky, air, lit).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        return dict(image=image.transpose(0, 1), mask=mask.to(torch.uint8), label=scene["label"],
                    depth=torch.where(sky | (t > self.max_depth), 0, t))


# --------------------------------------------------------------------------------------------------
# A sheet: rows of pictures with titles, and a legend. Tiles are RGB, (3, h, w), in [0, 1].

DEPTH_COLOURS = torch.tensor([  # from near to far; 0, no depth, is black
    [1, 0.96, 0.68], [0.99, 0.62, 0.36], [0.80, 0.26, 0.43], [0.42, 0.16, 0.50],
    [0.15, 0.12, 0.38]])


def class_colours(classes: int) -> Tensor:
    """(256, 3): a colour for each class, hues a golden angle apart; black for 255, ignored."""
    k = torch.arange(256)
    colours = hsv(k * 0.381966 % 1, 0.4 + 0.2 * (k % 3), 0.95 - 0.18 * (k % 4)).T
    colours[classes:] = 0
    return colours


def paint_classes(mask: Tensor, classes: int) -> Tensor:
    """Class map (h, w), 255 ignored -> tile (3, h, w)."""
    return class_colours(classes)[mask.long()].movedim(-1, 0)


def paint_depth(depth: Tensor, far: float) -> Tensor:
    """Depth (h, w) in metres, 0: none -> tile (3, h, w); the colours are spread over 0 to `far`."""
    at = (len(DEPTH_COLOURS) - 1) * (depth / max(far, 1e-9)).clamp(0, 1 - 1e-6)
    i = at.long()
    colour = torch.lerp(DEPTH_COLOURS[i], DEPTH_COLOURS[i + 1], at.frac()[..., None])
    return (colour * (depth > 0)[..., None]).movedim(-1, 0)


def sheet(path, rows: dict[str, list[Tensor]], classes=(), far: float = 0.0,
          side: int = 112) -> None:
    """Write a PNG: a row of tiles for each title, `side` pixels high; below it a legend of class
    names, if there are `classes`, and of depth, if there is a largest depth `far` in metres."""
    font = ImageFont.load_default()
    margin, gap, line = 96, 4, 18  # pixels: width for titles, gap between tiles, a legend's line

    def across(tile: Tensor) -> int:
        return max(round(side * tile.shape[2] / tile.shape[1]), 1)

    wide = max(across(tile) for row in rows.values() for tile in row)
    width = margin + max(map(len, rows.values())) * (wide + gap)
    in_a_line = max((width - margin) // 110, 1)  # class names
    lines = -(-len(classes) // in_a_line) + (far > 0)
    page = Image.new("RGB", (width, len(rows) * (side + gap) + gap + lines * line), "white")
    draw = ImageDraw.Draw(page)

    for i, (title, row) in enumerate(rows.items()):
        top = gap + i * (side + gap)
        for j, word in enumerate(title.split()):
            shift = 14 * (j - title.count(" ") / 2)  # the words of a title are centred
            draw.text((4, top + side // 2 - 8 + shift), word, "black", font)
        for j, tile in enumerate(row):
            big = F.interpolate(tile[None].float(), (side, across(tile)))
            page.paste(TF.to_pil_image(big[0].clamp(0, 1)), (margin + j * (wide + gap), top))

    top = len(rows) * (side + gap) + gap
    colours = (255 * class_colours(len(classes))).int().tolist()
    for i, name in enumerate(classes):
        x, y = margin + 110 * (i % in_a_line), top + line * (i // in_a_line)
        draw.rectangle((x, y + 2, x + 12, y + 14), tuple(colours[i]))
        draw.text((x + 18, y + 2), name[:15], "black", font)
    if far:
        y = top + line * (lines - 1)
        ramp = paint_depth(torch.linspace(1e-3, far, 200).expand(12, -1), far)
        draw.text((margin, y + 2), "0 m", "black", font)
        page.paste(TF.to_pil_image(ramp), (margin + 28, y + 2))
        draw.text((margin + 234, y + 2), f"{far:.3g} m; black: no depth", "black", font)
    page.save(path)


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".png"):
        sys.exit(__doc__)
    scenes = Scenes("test", 96)(torch.arange(8))
    sheet(sys.argv[1], {
        "picture": list(scenes["image"] / 255),
        "classes": [paint_classes(mask, len(CLASSES)) for mask in scenes["mask"]],
        "depth": [paint_depth(depth, Scenes.max_depth) for depth in scenes["depth"]],
    }, CLASSES, Scenes.max_depth)


if __name__ == "__main__":
    main()
