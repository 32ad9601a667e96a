"""From a scene's plan to pixels: road in perspective, scenery, weather, objects with their boxes.

A pinhole camera CAMERA_M above the road looks level along z; x to the right, y up, metres.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from pipeline.benchmark.brush import RGB, Brush, Tone, mix
from pipeline.benchmark.sprites import LAMPS, PAINT, THINGS, VEHICLES, traffic_light
from pipeline.benchmark.world import Scene, Thing

CAMERA_M = 2.2
HORIZON = 0.42
"""Share of the image above the horizon."""
LANE_M = 3.5
POST_M = 5.4
SUPERSAMPLE = 2
_DEPTHS = [3.0 * 1.14**i for i in range(30)]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Light:
    """How a kind of weather colours the world."""

    sky_top: RGB
    sky_low: RGB
    grass: RGB
    road: RGB
    haze: RGB
    haze_m: float
    """Depth at which haze takes 63% of a colour."""
    dim: float
    """Share of darkness on everything that does not shine."""


LIGHTS: dict[str, Light] = {
    "clear": Light((86, 150, 226), (206, 228, 246), (110, 168, 82), (98, 100, 106), (206, 228, 246), 400, 0.0),
    "rain": Light((92, 102, 116), (150, 158, 166), (76, 112, 74), (66, 70, 80), (140, 148, 156), 130, 0.12),
    "fog": Light((206, 209, 212), (214, 216, 218), (150, 164, 146), (140, 142, 146), (214, 216, 218), 42, 0.0),
    "night": Light((8, 10, 30), (34, 38, 74), (20, 36, 30), (40, 42, 52), (24, 26, 52), 160, 0.32),
    "snow": Light((178, 190, 206), (226, 232, 240), (240, 244, 248), (188, 194, 202), (230, 235, 242), 160, 0.0),
}


def render(scene: Scene, width: int, height: int) -> tuple[Image.Image, list[Box]]:
    """The image, and each object's box (x, y, w, h) in pixels, clipped to the frame, in the order of `scene.things`."""
    view = _View(scene, width * SUPERSAMPLE, height * SUPERSAMPLE)
    view.backdrop()
    boxes: dict[int, Box] = {}
    order = sorted(range(len(scene.things)), key=lambda i: -scene.things[i].depth_m)
    for index in order:
        boxes[index] = view.thing(scene.things[index])
    view.weather()
    image = view.image.resize((width, height), Image.Resampling.LANCZOS)
    scaled = [tuple(round(v / SUPERSAMPLE, 1) for v in boxes[i]) for i in range(len(scene.things))]
    return image, [(b[0], b[1], b[2], b[3]) for b in scaled]


class _View:
    """One image being drawn, in supersampled pixels."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene, self.width, self.height = scene, width, height
        self.light = LIGHTS[scene.weather]
        self.focal = float(width)
        self.horizon = height * HORIZON
        self.rng = Random(scene.scenery_seed)
        self.image = Image.new("RGB", (width, height))
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def project(self, x: float, z: float) -> tuple[float, float]:
        """Pixel of a point of the ground; the road bends sideways with the square of the depth."""
        bend = 0.003 * self.scene.bend * z * z
        return self.width / 2 + self.focal * (x + bend) / z, self.horizon + self.focal * CAMERA_M / z

    def tone(self, depth: float) -> Tone:
        """Colours at a depth: dimmed, then hazed."""
        haze = 1 - math.exp(-depth / self.light.haze_m)
        dim = self.light.dim * (0.6 if depth < 14 else 1.0)  # headlights reach the near ones
        return lambda colour: mix(mix(colour, (6, 8, 20), dim), self.light.haze, haze)

    def backdrop(self) -> None:
        """Sky, hills, verge, road and what stands beside it."""
        self._sky()
        self.draw.rectangle([0, self.horizon, self.width, self.height], fill=self.light.grass)
        self._hills()
        self._band(-1.5 * LANE_M - 0.9, 1.5 * LANE_M + 0.9, mix(self.light.road, (170, 150, 120), 0.35))
        self._band(-1.5 * LANE_M, 1.5 * LANE_M, self.light.road)
        for x in (-1.5 * LANE_M + 0.15, 1.5 * LANE_M - 0.15):
            self._band(x - 0.09, x + 0.09, (236, 236, 232))
        for x in (-0.5 * LANE_M, 0.5 * LANE_M):
            self._dashes(x)
        for z in sorted((self.rng.uniform(16, 70) for _ in range(9)), reverse=True):
            self._scenery(self.rng.choice((-1, 1)) * self.rng.uniform(9, 20), z)

    def thing(self, thing: Thing) -> Box:
        """Draw one object; its box (x, y, w, h), clipped to the frame."""
        sides = {"left": -1.0, "ahead": 0.0, "right": 1.0}
        post = thing.role in ("sign", "light")
        lateral = sides[thing.position] * (POST_M if post else LANE_M) + thing.offset_m * (0.4 if post else 1.0)
        x0, y0 = self.project(lateral, thing.depth_m)
        scale = self.focal / thing.depth_m
        brush = Brush(self.image, x0, y0, scale, self.tone(thing.depth_m), thing.mirrored and not post)
        if thing.kind in LAMPS:
            traffic_light(brush, thing.kind, thing.position == "ahead")
        elif thing.colour is not None:
            lean = -sides[thing.position]
            VEHICLES[thing.kind](brush, PAINT[thing.colour], -lean if brush.mirrored else lean)
        else:
            THINGS[thing.kind](brush)
        left, top, right, bottom = brush.bounds
        left, top = max(0.0, left), max(0.0, top)
        return left, top, min(self.width, right) - left, min(self.height, bottom) - top

    def weather(self) -> None:
        """What falls or shines between camera and world."""
        if self.scene.weather == "rain":
            self._streaks(150, (214, 224, 236, 90))
        elif self.scene.weather == "snow":
            self._flakes(170)
        elif self.scene.weather == "night":
            self._stars()
            self._headlights()

    def _sky(self) -> None:
        for y in range(math.ceil(self.horizon)):
            colour = mix(self.light.sky_top, self.light.sky_low, y / self.horizon)
            self.draw.line([(0, y), (self.width, y)], fill=colour)

    def _hills(self) -> None:
        phase, tone = self.rng.uniform(0, 6.28), self.tone(120)
        for size, base in ((0.10, (84, 110, 120)), (0.06, (74, 112, 84))):
            crest = [
                (x, self.horizon - self.height * size * (0.55 + 0.45 * math.sin(phase + x * 5.2 / self.width)))
                for x in range(0, self.width + 8, 8)
            ]
            self.draw.polygon([*crest, (self.width, self.horizon), (0, self.horizon)], fill=tone(base))
            phase += 2.1

    def _band(self, left: float, right: float, fill: RGB) -> None:
        """A strip of ground between two lateral positions, hazing with depth."""
        for near, far in itertools.pairwise(_DEPTHS):
            corners = [self.project(x, z) for x, z in ((left, near), (right, near), (right, far), (left, far))]
            self.draw.polygon(corners, fill=self.tone((near + far) / 2)(fill))

    def _dashes(self, x: float) -> None:
        z = 3.0
        while z < 70:
            corners = [self.project(x + dx, d) for dx, d in ((-0.08, z), (0.08, z), (0.08, z + 2), (-0.08, z + 2))]
            self.draw.polygon(corners, fill=self.tone(z)((236, 236, 232)))
            z += 5.0

    def _scenery(self, x: float, z: float) -> None:
        (x0, y0), scale, tone = self.project(x, z), self.focal / z, self.tone(z)
        if self.rng.random() < 0.7:
            height = self.rng.uniform(3, 5)
            self.draw.rectangle(
                [x0 - 0.2 * scale, y0 - height * 0.5 * scale, x0 + 0.2 * scale, y0], fill=tone((92, 70, 50))
            )
            crown = tone(mix((58, 104, 62), (88, 122, 60), self.rng.random()))
            r = height * 0.36 * scale
            for dx, dy in ((-0.5, 0.6), (0.5, 0.62), (0, 0.95)):
                cx, cy = x0 + dx * r, y0 - height * dy * scale
                self.draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=crown)
            return
        self._house(x0, y0, scale, tone)

    def _house(self, x0: float, y0: float, scale: float, tone: Tone) -> None:
        w, h = self.rng.uniform(5, 8) * scale / 2, self.rng.uniform(3, 4.5) * scale
        wall = self.rng.choice(((198, 186, 170), (176, 168, 162), (206, 198, 184)))
        self.draw.rectangle([x0 - w, y0 - h, x0 + w, y0], fill=tone(wall))
        roof = [(x0 - 1.1 * w, y0 - h), (x0, y0 - 1.5 * h), (x0 + 1.1 * w, y0 - h)]
        self.draw.polygon(roof, fill=tone((124, 92, 84)))
        pane = (250, 222, 140) if self.scene.weather == "night" else (128, 146, 160)
        for side in (-0.5, 0.5):
            cx = x0 + side * w
            self.draw.rectangle([cx - 0.18 * w, y0 - 0.75 * h, cx + 0.18 * w, y0 - 0.4 * h], fill=tone(pane))

    def _streaks(self, count: int, fill: Sequence[int]) -> None:
        for _ in range(count):
            x, y, s = self.rng.uniform(0, self.width), self.rng.uniform(0, self.height), self.height * 0.05
            self.draw.line([(x, y), (x - 0.25 * s, y + s)], fill=tuple(fill), width=SUPERSAMPLE)

    def _flakes(self, count: int) -> None:
        for _ in range(count):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0, self.height)
            r = self.rng.uniform(0.5, 1.2) * SUPERSAMPLE
            self.draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255, 215))

    def _stars(self) -> None:
        for _ in range(24):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0, self.horizon * 0.5)
            self.draw.point((x, y), fill=(220, 220, 240, 200))

    def _headlights(self) -> None:
        """Two warm cones on the road; light that a wet lens spreads."""
        glow = Image.new("L", self.image.size)
        pen = ImageDraw.Draw(glow)
        for x in (-0.8, 0.8):
            near, far = self.project(x, 3.5), self.project(x * 1.6, 16)
            spread = self.width * 0.05
            pen.polygon(
                [(near[0] - 2 * spread, self.height), (near[0] + 2 * spread, self.height), (far[0] + spread, far[1]),
                 (far[0] - spread, far[1])],
                fill=54,
            )  # fmt: skip
        glow = glow.filter(ImageFilter.GaussianBlur(self.width * 0.02))
        self.image.paste(Image.new("RGB", self.image.size, (255, 240, 200)), mask=glow)
