"""One drawing function per kind of object, in metres around its ground point.

Small things are drawn larger than life: a patch of 16 pixels is the finest thing a small vision tower resolves.
"""

import math
from collections.abc import Callable

from PIL import ImageFont

from pipeline.benchmark.brush import RGB, Brush, mix

PAINT: dict[str, RGB] = {
    "red": (214, 30, 34),
    "blue": (28, 84, 212),
    "white": (242, 242, 244),
    "black": (34, 34, 40),
    "yellow": (246, 200, 24),
}
_INK: RGB = (22, 22, 26)
_GLASS: RGB = (120, 178, 212)
_STEEL: RGB = (150, 154, 160)
_SKIN: RGB = (232, 180, 140)
_HAZARD: RGB = (250, 208, 30)
_TAIL: RGB = (255, 44, 36)


def _sides(brush: Brush, w: float, low: float, high: float, lean: float, colour: RGB) -> None:
    """The flank seen when a vehicle stands to the left or right of the camera; lean > 0: flank on the right."""
    if abs(lean) < 0.15:
        return
    x, dx = math.copysign(w / 2, lean), lean * 0.3
    brush.poly([(x, low), (x + dx, low + 0.25), (x + dx, high - 0.12), (x, high)], mix(colour, _INK, 0.35))


def _wheels(brush: Brush, half: float) -> None:
    for x in (-half, half):
        brush.rect(x - 0.17, 0.0, x + 0.17, 0.5, _INK)


def _tail_lights(brush: Brush, half: float, y: float, size: float = 0.14) -> None:
    for x in (-half, half):
        brush.glow(x, y, size, _TAIL, strength=0.3)


def car(brush: Brush, colour: RGB, lean: float) -> None:
    """Low body with a narrower cabin."""
    brush.shadow(1.2)
    _wheels(brush, 0.78)
    _sides(brush, 2.0, 0.3, 1.0, lean, colour)
    brush.poly([(-1.02, 0.28), (1.02, 0.28), (1.02, 0.9), (0.92, 1.04), (-0.92, 1.04), (-1.02, 0.9)], colour, _INK)
    brush.poly([(-0.9, 1.0), (0.9, 1.0), (0.66, 1.62), (-0.66, 1.62)], colour, _INK)
    brush.poly([(-0.72, 1.06), (0.72, 1.06), (0.56, 1.5), (-0.56, 1.5)], _GLASS)
    brush.rect(-0.3, 0.5, 0.3, 0.68, (236, 236, 220))
    brush.rect(-1.0, 0.28, 1.0, 0.4, _INK)
    _tail_lights(brush, 0.82, 0.8)


def van(brush: Brush, colour: RGB, lean: float) -> None:
    """Tall rounded box with two door windows and a seam between the doors."""
    brush.shadow(1.3)
    _wheels(brush, 0.8)
    _sides(brush, 2.1, 0.3, 2.2, lean, colour)
    brush.poly([(-1.06, 0.3), (1.06, 0.3), (1.06, 1.9), (0.86, 2.4), (-0.86, 2.4), (-1.06, 1.9)], colour, _INK)
    for side in (-1, 1):
        brush.poly([(side * 0.1, 1.45), (side * 0.88, 1.45), (side * 0.76, 2.15), (side * 0.1, 2.15)], _GLASS, _INK)
    brush.line([(0, 0.4), (0, 2.38)], _INK, 0.06)
    brush.rect(-1.04, 0.3, 1.04, 0.44, _INK)
    _tail_lights(brush, 0.9, 0.85, 0.15)


def truck(brush: Brush, colour: RGB, lean: float) -> None:
    """A cargo box high above the road: steel doors with bars in a coloured frame, striped bumper."""
    brush.shadow(1.5)
    for x in (-0.95, 0.95):
        brush.rect(x - 0.28, 0.0, x + 0.28, 0.72, _INK)
    _sides(brush, 2.6, 0.9, 3.2, lean, colour)
    brush.rect(-1.3, 0.85, 1.3, 3.2, colour, _INK)
    brush.rect(-0.98, 1.1, 0.98, 2.9, mix(colour, (255, 255, 255), 0.55 if colour != PAINT["white"] else 0.0), _INK)
    brush.line([(0, 1.1), (0, 2.9)], _INK, 0.08)
    for x in (-0.35, 0.35):
        brush.line([(x, 1.1), (x, 2.9)], _STEEL, 0.07)
    for i in range(6):
        brush.rect(-1.3 + i * 0.434, 0.6, -1.3 + (i + 1) * 0.434, 0.85, (236, 90, 30) if i % 2 else (245, 245, 245))
    _tail_lights(brush, 1.1, 0.95, 0.13)


def bus(brush: Brush, colour: RGB, lean: float) -> None:
    """Tall and wide, a full-width rear window, a lit number board and a light band."""
    brush.shadow(1.6)
    _wheels(brush, 1.05)
    _sides(brush, 2.8, 0.35, 3.2, lean, colour)
    brush.poly([(-1.4, 0.35), (1.4, 0.35), (1.4, 3.1), (1.25, 3.3), (-1.25, 3.3), (-1.4, 3.1)], colour, _INK)
    brush.rect(-1.2, 1.55, 1.2, 2.6, _GLASS, _INK)
    brush.poly([(-1.2, 1.55), (-0.5, 1.55), (0.1, 2.6), (-0.7, 2.6)], mix(_GLASS, (255, 255, 255), 0.35))
    brush.rect(-0.75, 2.72, 0.75, 3.12, _INK)
    brush.rect(-0.6, 2.82, 0.6, 3.02, (255, 176, 40))
    brush.rect(-1.4, 1.15, 1.4, 1.35, (250, 250, 250) if colour != PAINT["white"] else (40, 150, 90))
    brush.rect(-0.6, 0.5, 0.6, 0.95, mix(colour, _INK, 0.5))
    _tail_lights(brush, 1.2, 0.8, 0.15)


def pedestrian(brush: Brush) -> None:
    """A walking person in a pink top."""
    brush.shadow(0.6)
    brush.line([(0.02, 1.0), (-0.34, 0.05)], (38, 50, 110), 0.25)
    brush.line([(0.02, 1.0), (0.36, 0.05)], (52, 66, 138), 0.25)
    brush.line([(0.0, 1.65), (-0.42, 1.05)], (206, 40, 140), 0.18)
    brush.poly([(-0.3, 0.95), (0.3, 0.95), (0.34, 1.8), (-0.34, 1.8)], (240, 60, 165), _INK)
    brush.line([(0.05, 1.65), (0.45, 1.15)], (206, 40, 140), 0.18)
    brush.disc(0.03, 2.08, 0.27, _SKIN, _INK)
    brush.poly([(-0.24, 2.1), (-0.1, 2.36), (0.2, 2.36), (0.3, 2.14)], (70, 40, 24))


def _rider(brush: Brush, top: RGB, helmet: RGB) -> None:
    brush.line([(-0.15, 1.1), (0.2, 0.5)], (40, 40, 60), 0.26)
    brush.poly([(-0.45, 1.0), (-0.05, 1.0), (0.36, 1.75), (0.0, 1.95)], top, _INK)
    brush.line([(0.2, 1.7), (0.6, 1.25)], top, 0.18)
    brush.disc(0.32, 2.12, 0.27, _SKIN, _INK)
    brush.poly([(0.03, 2.14), (0.1, 2.4), (0.34, 2.5), (0.56, 2.36), (0.62, 2.16)], helmet, _INK)


def cyclist(brush: Brush) -> None:
    """A rider in green on two large thin wheels, seen from the side."""
    brush.shadow(1.0)
    for x in (-0.72, 0.72):
        brush.oval(x, 0.5, 0.48, 0.5, (205, 210, 214), _INK, 0.1)
    brush.line([(-0.72, 0.5), (-0.25, 1.05), (0.55, 1.05), (0.0, 0.45), (-0.25, 1.05)], (0, 180, 90), 0.1)
    brush.line([(0.72, 0.5), (0.55, 1.3)], (0, 180, 90), 0.1)
    _rider(brush, (60, 214, 70), (250, 250, 250))


def motorcyclist(brush: Brush) -> None:
    """A rider in orange leathers with a black helmet on a heavy machine, seen from the side."""
    brush.shadow(1.1)
    for x in (-0.8, 0.8):
        brush.disc(x, 0.42, 0.42, _INK)
        brush.disc(x, 0.42, 0.17, _STEEL)
    brush.poly([(-1.05, 0.75), (-0.4, 0.45), (0.45, 0.45), (0.95, 0.95), (0.4, 1.2), (-0.4, 1.0)], (124, 40, 190), _INK)
    _rider(brush, (255, 128, 0), (30, 30, 36))
    brush.glow(0.95, 0.98, 0.14, (255, 244, 190), 0.4)


def deer(brush: Brush) -> None:
    """A brown deer with antlers and a white tail, seen from the side."""
    brush.shadow(1.1)
    coat: RGB = (158, 92, 40)
    for x in (-0.75, -0.5, 0.45, 0.7):
        brush.line([(x, 1.0), (x + 0.04, 0.04)], mix(coat, _INK, 0.3), 0.15)
    brush.oval(0.0, 1.2, 0.98, 0.42, coat, _INK)
    brush.disc(-0.95, 1.38, 0.17, (250, 244, 230))
    brush.poly([(0.55, 1.2), (0.95, 1.45), (1.12, 2.05), (0.84, 2.05)], coat)
    brush.poly([(0.8, 1.95), (1.45, 1.85), (1.45, 2.03), (1.05, 2.28), (0.82, 2.22)], coat, _INK)
    for dx in (-0.25, 0.25):
        brush.line([(0.95, 2.2), (0.95 + dx, 2.55), (0.95 + 2 * dx, 2.9)], (226, 200, 150), 0.09)
        brush.line([(0.95 + dx, 2.55), (0.95 + dx * 0.4, 2.85)], (226, 200, 150), 0.08)


def stroller(brush: Brush) -> None:
    """A turquoise pram with a round hood and big white wheels."""
    brush.shadow(0.9)
    brush.line([(-0.6, 1.0), (-1.05, 1.75)], _STEEL, 0.1)
    brush.line([(-0.5, 0.8), (0.5, 0.3)], _STEEL, 0.09)
    brush.line([(0.5, 0.8), (-0.5, 0.3)], _STEEL, 0.09)
    brush.poly([(-0.75, 1.1), (0.85, 1.1), (0.6, 0.62), (-0.5, 0.62)], (0, 200, 205), _INK)
    hood = [(0.05 + 0.85 * math.cos(a / 8 * math.pi), 1.1 + 0.8 * math.sin(a / 8 * math.pi)) for a in range(0, 6)]
    brush.poly([(0.05, 1.1), *hood], (0, 146, 168), _INK)
    for x in (-0.55, 0.55):
        brush.disc(x, 0.3, 0.3, (246, 246, 246), _INK, 0.09)


def traffic_cone(brush: Brush) -> None:
    """A row of three orange cones with white bands."""
    for x, size in ((-0.75, 0.95), (0.75, 0.95), (0.0, 1.15)):
        brush.rect(x - 0.5 * size, 0.0, x + 0.5 * size, 0.12, (200, 70, 0))
        for low, high, fill in (
            (0.1, 1.3, (255, 110, 0)),
            (0.42, 0.66, (255, 255, 255)),
            (0.86, 1.04, (255, 255, 255)),
        ):
            a, b = 0.36 * (1 - low / 1.5) * size, 0.36 * (1 - high / 1.5) * size
            brush.poly([(x - a, low * size), (x + a, low * size), (x + b, high * size), (x - b, high * size)], fill)


def concrete_barrier(brush: Brush) -> None:
    """A grey wall with a black and yellow band."""
    brush.shadow(1.5)
    brush.poly([(-1.4, 0), (1.4, 0), (1.25, 0.35), (1.2, 1.25), (-1.2, 1.25), (-1.25, 0.35)], (196, 196, 190), _INK)
    brush.poly([(-1.4, 0), (1.4, 0), (1.25, 0.35), (-1.25, 0.35)], (168, 168, 162))
    brush.rect(-1.2, 0.66, 1.2, 1.1, _HAZARD)
    for i in range(5):
        x = -1.2 + i * 0.48
        brush.poly([(x, 0.66), (x + 0.24, 0.66), (x + 0.4, 1.1), (x + 0.16, 1.1)], _INK)


def plastic_barrier(brush: Brush) -> None:
    """Water-filled blocks, red and white by turns."""
    brush.shadow(1.5)
    for i in range(4):
        x = -1.4 + 0.7 * i
        fill: RGB = (236, 40, 30) if i % 2 == 0 else (250, 250, 250)
        brush.poly([(x, 0), (x + 0.7, 0), (x + 0.64, 1.2), (x + 0.06, 1.2)], fill, (120, 20, 16))
        brush.rect(x + 0.22, 0.35, x + 0.48, 0.7, mix(fill, _INK, 0.4))


def dustbin(brush: Brush) -> None:
    """A green wheeled bin with a lid."""
    brush.shadow(0.8)
    brush.poly([(-0.55, 0.1), (0.55, 0.1), (0.72, 1.4), (-0.72, 1.4)], (18, 130, 60), _INK)
    for x in (-0.3, 0.0, 0.3):
        brush.line([(x, 0.3), (x * 1.25, 1.25)], (10, 92, 40), 0.09)
    brush.poly([(-0.82, 1.4), (0.82, 1.4), (0.7, 1.68), (-0.7, 1.68)], (60, 190, 100), _INK)
    for x in (-0.45, 0.45):
        brush.disc(x, 0.14, 0.17, _INK)


def overturned_truck(brush: Brush) -> None:
    """A lorry on its side: underbody and wheels towards the camera, spilled fuel."""
    brush.shadow(2.0)
    brush.oval(0.2, 0.0, 1.9, 0.16, (24, 20, 34))
    brush.poly([(-1.7, 0.05), (0.95, 0.05), (0.95, 1.75), (-1.7, 1.75)], (150, 158, 170), _INK)
    brush.poly([(1.0, 0.05), (1.7, 0.05), (1.7, 1.2), (1.35, 1.55), (1.0, 1.55)], (240, 120, 30), _INK)
    brush.rect(-1.7, 0.75, 1.3, 1.0, (84, 62, 52))
    for x in (-1.25, -0.6, 1.25):
        for y in (0.42, 1.36):
            brush.disc(x, y, 0.33, _INK)
            brush.disc(x, y, 0.14, (220, 220, 224))
    brush.poly([(-1.7, 1.75), (0.95, 1.75), (0.8, 1.98), (-1.5, 1.98)], (190, 198, 208), _INK)


def fallen_cargo(brush: Brush) -> None:
    """A heap of brown cardboard boxes with tape."""
    brush.shadow(1.3)
    boxes = ((-1.15, 0.0, 0.95), (0.1, 0.0, 1.05), (-0.6, 0.88, 0.85))
    for x, y, s in boxes:
        brush.rect(x, y, x + s, y + s * 0.92, (206, 150, 88), (110, 70, 30))
        brush.rect(x + s * 0.4, y, x + s * 0.58, y + s * 0.92, (240, 214, 160))
    brush.poly([(0.1, 0.97), (1.15, 0.97), (1.4, 1.2), (0.4, 1.2)], (170, 116, 60), (110, 70, 30))


def fallen_tree(brush: Brush) -> None:
    """A trunk across the lane with its green crown."""
    brush.shadow(1.7)
    brush.poly([(-1.65, 0.1), (0.4, 0.25), (0.4, 0.62), (-1.65, 0.6)], (116, 72, 34), _INK)
    brush.disc(-1.62, 0.35, 0.27, (226, 186, 130), (116, 72, 34), 0.07)
    for x, y, r, g in ((0.55, 0.5, 0.5, 120), (1.2, 0.55, 0.55, 140), (0.85, 1.0, 0.55, 160), (1.3, 1.05, 0.38, 130)):
        brush.disc(x, y, r, (30, g, 30), (16, 74, 20))


def tyre_debris(brush: Brush) -> None:
    """Two torn tyres, one on the other, with pale rims so that they stand out from the asphalt."""
    brush.shadow(1.2)
    for x, y, rx, ry in ((-0.62, 0.42, 0.6, 0.42), (0.62, 0.42, 0.6, 0.42), (0.0, 1.08, 0.62, 0.46)):
        brush.oval(x, y, rx, ry, (26, 26, 30), (120, 120, 126), 0.07)
        brush.oval(x, y, rx * 0.5, ry * 0.5, (206, 206, 212), (70, 70, 76), 0.07)


def _post(brush: Brush, height: float) -> None:
    brush.rect(-0.07, 0.0, 0.07, height, _STEEL, counts=False)


def stop_sign(brush: Brush) -> None:
    """A red octagon with the word on it."""
    _post(brush, 2.6)
    for radius, fill in ((1.12, (250, 250, 250)), (1.0, (200, 16, 24))):
        turn = [(a + 0.5) * math.pi / 4 for a in range(8)]
        brush.poly([(radius * math.cos(t), 3.0 + radius * math.sin(t)) for t in turn], fill)
    _letters(brush, "STOP", 3.0, 0.78, (255, 255, 255))


def speed_limit_sign(brush: Brush) -> None:
    """A white disc with a red ring and a number."""
    _post(brush, 2.6)
    brush.disc(0, 3.0, 1.02, (255, 255, 255), (224, 20, 30), 0.24)
    _letters(brush, "50", 3.0, 0.95, _INK)


def warning_sign(brush: Brush) -> None:
    """A yellow diamond with a black bar and dot."""
    _post(brush, 2.6)
    for radius, fill in ((1.24, _INK), (1.1, (255, 214, 0))):
        brush.poly([(0, 3.0 - radius), (radius, 3.0), (0, 3.0 + radius), (-radius, 3.0)], fill)
    brush.rect(-0.12, 2.85, 0.12, 3.6, _INK)
    brush.disc(0, 2.55, 0.15, _INK)


def _letters(brush: Brush, text: str, y: float, height: float, fill: RGB) -> None:
    font = ImageFont.load_default(max(4.0, height * brush.scale))
    brush.text(text, y, font, fill)


LAMPS: dict[str, RGB] = {"red light": (255, 30, 24), "yellow light": (255, 196, 0), "green light": (20, 235, 90)}


def traffic_light(brush: Brush, kind: str, overhead: bool) -> None:
    """Three lamps in a black housing: upright on a post, or lying on a gantry above the road."""
    if overhead:
        brush.rect(-4.6, 4.15, 4.6, 4.27, _STEEL, counts=False)
        brush.rect(4.48, 0.0, 4.66, 4.27, _STEEL, counts=False)
        brush.rect(-1.65, 3.45, 1.65, 4.6, (18, 18, 20), (86, 88, 92))
    else:
        _post(brush, 2.0)
        brush.rect(-0.58, 1.8, 0.58, 4.75, (18, 18, 20), (86, 88, 92))
    for i, name in enumerate(LAMPS):
        x, y = (-1.05 + 1.05 * i, 4.02) if overhead else (0.0, 4.2 - 0.93 * i)
        if name == kind:
            brush.glow(x, y, 0.46, LAMPS[name], 0.8)
        else:
            brush.disc(x, y, 0.36, mix(LAMPS[name], _INK, 0.82))


VEHICLES: dict[str, Callable[[Brush, RGB, float], None]] = {"car": car, "van": van, "truck": truck, "bus": bus}
THINGS: dict[str, Callable[[Brush], None]] = {
    "pedestrian": pedestrian,
    "cyclist": cyclist,
    "motorcyclist": motorcyclist,
    "stop sign": stop_sign,
    "speed limit sign": speed_limit_sign,
    "warning sign": warning_sign,
    "traffic cone": traffic_cone,
    "concrete barrier": concrete_barrier,
    "plastic barrier": plastic_barrier,
    "dustbin": dustbin,
    "overturned truck": overturned_truck,
    "fallen cargo": fallen_cargo,
    "fallen tree": fallen_tree,
    "tyre debris": tyre_debris,
    "deer": deer,
    "stroller": stroller,
}
