"""Drawing in metres: a brush placed at a point of the road, which keeps the bounding box of what it drew."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Tone = Callable[[RGB], RGB]


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """Colour between two: share 0 gives the first, 1 the second."""
    r, g, b = (round(a + (c - a) * share) for a, c in zip(first, second, strict=True))
    return r, g, b


@dataclass(slots=True)
class Brush:
    """Draws one object. x to the right, y up, in metres from the object's ground point."""

    image: Image.Image
    x0: float
    """Ground point in pixels."""
    y0: float
    scale: float
    """Pixels per metre at the object's depth."""
    tone: Tone
    """Weather and light, applied to every colour except glow."""
    mirrored: bool = False
    bounds: list[float] = field(default_factory=lambda: [math.inf, math.inf, -math.inf, -math.inf])
    """Left, top, right, bottom in pixels of everything drawn that counts as the object."""

    def poly(
        self, points: Iterable[tuple[float, float]], fill: RGB, outline: RGB | None = None, counts: bool = True
    ) -> None:
        """A filled polygon; an outline is drawn dark and thin."""
        pixels = [self._pixel(x, y) for x, y in points]
        if counts:
            self._grow(pixels)
        edge = self.tone(outline) if outline else None
        self._draw().polygon(pixels, fill=self.tone(fill), outline=edge, width=max(1, round(self.scale * 0.05)))

    def rect(
        self, x1: float, y1: float, x2: float, y2: float, fill: RGB, outline: RGB | None = None, counts: bool = True
    ) -> None:
        """An axis-parallel rectangle."""
        self.poly([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], fill, outline, counts)

    def disc(
        self, x: float, y: float, radius: float, fill: RGB, outline: RGB | None = None, width: float = 0.05
    ) -> None:
        """A circle."""
        self.oval(x, y, radius, radius, fill, outline, width)

    def oval(
        self, x: float, y: float, rx: float, ry: float, fill: RGB, outline: RGB | None = None, width: float = 0.05
    ) -> None:
        """An axis-parallel ellipse around (x, y)."""
        (px, py), r, s = self._pixel(x, y), rx * self.scale, ry * self.scale
        box = [(px - r, py - s), (px + r, py + s)]
        self._grow(box)
        edge = self.tone(outline) if outline else None
        self._draw().ellipse(box, fill=self.tone(fill), outline=edge, width=max(1, round(self.scale * width)))

    def line(self, points: Iterable[tuple[float, float]], fill: RGB, width: float, counts: bool = True) -> None:
        """A polyline of a width in metres."""
        pixels = [self._pixel(x, y) for x, y in points]
        if counts:
            self._grow(pixels)
        self._draw().line(pixels, fill=self.tone(fill), width=max(1, round(width * self.scale)), joint="curve")

    def glow(self, x: float, y: float, radius: float, colour: RGB, strength: float = 0.55) -> None:
        """A lamp: its own light, so weather does not darken it, with a halo that is no part of the object."""
        px, py = self._pixel(x, y)
        draw = self._draw()
        for ring in range(4, 0, -1):
            r = radius * self.scale * (1 + 0.35 * ring)
            draw.ellipse([px - r, py - r, px + r, py + r], fill=(*colour, round(255 * strength / (2 + 1.6 * ring))))
        r = radius * self.scale
        draw.ellipse([px - r, py - r, px + r, py + r], fill=colour)
        self._grow([(px - r, py - r), (px + r, py + r)])

    def text(self, text: str, y: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, fill: RGB) -> None:
        """Letters centred on the object's axis, never mirrored."""
        self._draw().text((self.x0, self.y0 - y * self.scale), text, font=font, fill=self.tone(fill), anchor="mm")

    def shadow(self, half_width: float, lift: float = 0.0) -> None:
        """A soft patch on the road under the object."""
        draw = self._draw()
        for grow, alpha in ((1.15, 45), (1.0, 70), (0.8, 70)):
            rx, ry = half_width * grow * self.scale, 0.13 * grow * self.scale * (1 + lift)
            draw.ellipse([self.x0 - rx, self.y0 - ry, self.x0 + rx, self.y0 + ry], fill=(0, 0, 0, alpha))

    def _draw(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image, "RGBA")

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        return self.x0 + (-x if self.mirrored else x) * self.scale, self.y0 - y * self.scale

    def _grow(self, pixels: Iterable[tuple[float, float]]) -> None:
        for x, y in pixels:
            left, top, right, bottom = self.bounds
            self.bounds = [min(left, x), min(top, y), max(right, x), max(bottom, y)]
