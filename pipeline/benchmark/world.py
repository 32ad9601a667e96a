"""What a drawn scene holds and what it asks of the driver: kinds, plans, rules. No pixels, no words.

The plan of a scene is sampled first; drawing (`art`) and wording (`text`) both follow from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Position = Literal["left", "ahead", "right"]
Distance = Literal["near", "far"]
Role = Literal["vehicle", "living", "obstacle", "sign", "light"]

GROUPS = (
    "vehicles",
    "vulnerable_road_users",
    "traffic_signs",
    "traffic_lights",
    "traffic_cones",
    "barriers",
    "other_objects",
)
"""CODA-LM's seven classes, in its order."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A category of object."""

    group: str
    """One of GROUPS."""
    role: Role
    """What it means for the driver."""
    rare: bool = False
    """Only corner cases hold it."""


KINDS: dict[str, Kind] = {
    "car": Kind("vehicles", "vehicle"),
    "van": Kind("vehicles", "vehicle"),
    "truck": Kind("vehicles", "vehicle"),
    "bus": Kind("vehicles", "vehicle"),
    "pedestrian": Kind("vulnerable_road_users", "living"),
    "cyclist": Kind("vulnerable_road_users", "living"),
    "motorcyclist": Kind("vulnerable_road_users", "living"),
    "stop sign": Kind("traffic_signs", "sign"),
    "speed limit sign": Kind("traffic_signs", "sign"),
    "warning sign": Kind("traffic_signs", "sign"),
    "red light": Kind("traffic_lights", "light"),
    "yellow light": Kind("traffic_lights", "light"),
    "green light": Kind("traffic_lights", "light"),
    "traffic cone": Kind("traffic_cones", "obstacle"),
    "concrete barrier": Kind("barriers", "obstacle"),
    "plastic barrier": Kind("barriers", "obstacle"),
    "dustbin": Kind("other_objects", "obstacle"),
    "overturned truck": Kind("other_objects", "obstacle", rare=True),
    "fallen cargo": Kind("other_objects", "obstacle", rare=True),
    "fallen tree": Kind("other_objects", "obstacle", rare=True),
    "tyre debris": Kind("other_objects", "obstacle", rare=True),
    "deer": Kind("other_objects", "living", rare=True),
    "stroller": Kind("other_objects", "living", rare=True),
}

COLOURS = ("red", "blue", "white", "black", "yellow")
WEATHERS = ("clear", "rain", "fog", "night")
RARE_WEATHER = "snow"
ACTIONS = (
    "stop",
    "give way",
    "change to the left lane",
    "change to the right lane",
    "slow down",
    "follow at a distance",
    "keep speed",
)

HELD_OUT_COLOURS = frozenset({("car", "yellow"), ("van", "red"), ("truck", "blue"), ("bus", "black")})
"""(vehicle, colour) pairs that only the Test split draws."""
HELD_OUT_WEATHER = frozenset(
    {
        ("pedestrian", "fog"),
        ("cyclist", "rain"),
        ("stop sign", "night"),
        ("plastic barrier", "rain"),
        ("green light", "fog"),
        ("overturned truck", "fog"),
        ("deer", "night"),
    }
)
"""(kind, weather) pairs that only the Test split draws."""
HELD_OUT_SHARE = 0.3
"""Share of Test scenes that must hold at least one held-out pair."""

# Presence of a class in a draft. Independent draws of similar size, so that no class can be guessed without looking.
_PRESENCE = {
    "vehicles": 0.42,
    "vulnerable_road_users": 0.36,
    "traffic_signs": 0.36,
    "traffic_lights": 0.34,
    "traffic_cones": 0.15,
    "barriers": 0.26,
    "other_objects": 0.13,
}
# Within a class. The rules make drafts with these kinds rarer than the others, so they are drawn more often.
_KIND_WEIGHT = {
    "red light": 2.5,
    "stop sign": 2.5,
    "warning sign": 1.4,
    "pedestrian": 1.3,
    "deer": 1.5,
    "overturned truck": 1.3,
}
_ACTION_WEIGHT = {"stop": 1.6}
_SECOND_VEHICLE = 0.4
_RARE_OBJECT_SHARE = 0.8  # of corner cases; the others are corner cases by their weather
_DEPTH_M = {"near": (9.5, 11.5), "far": (16.5, 19.0)}
_POST_DEPTH_M = {"near": (14.2, 15.2), "far": (19.5, 21.5)}
"""Further off: a post beside the road leaves the frame sooner."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    kind: str
    position: Position
    distance: Distance
    colour: str | None
    """Vehicles only."""
    depth_m: float
    """Metres from the camera along the road."""
    offset_m: float
    """Lateral offset from the lane's (or post's) place, to the right."""
    mirrored: bool

    @property
    def role(self) -> Role:
        """What it means for the driver."""
        return KINDS[self.kind].role

    @property
    def group(self) -> str:
        """CODA-LM's class of it."""
        return KINDS[self.kind].group

    @property
    def on_road(self) -> bool:
        """Whether it stands in a lane, not beside the road."""
        return self.role in ("vehicle", "living", "obstacle")


@dataclass(frozen=True, slots=True)
class Scene:
    """The plan of one image."""

    weather: str
    corner: bool
    bend: float
    """Curvature in [-1, 1]; positive bends right."""
    things: tuple[Thing, ...]
    """Two to four objects in class order, at most one per lane."""
    scenery_seed: int
    """Seed of everything that carries no meaning: trees, houses, rain drops."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rules ask of the driver, and the object that asks for it."""

    action: str
    cause: Thing | None
    """None: the weather, or nothing at all, decides."""


def plan_scene(rng: Random, *, corner: bool, held_out: bool) -> Scene:
    """Sample a scene whose action is about uniform over ACTIONS.

    Args:
        rng: source of all randomness.
        corner: draw a corner case (rare object or rare weather).
        held_out: False: no held-out pair ever (training, validation). True: HELD_OUT_SHARE of scenes hold one.
    """
    target = _weighted(rng, ACTIONS, _ACTION_WEIGHT)
    must_hold_out = held_out and rng.random() < HELD_OUT_SHARE
    while True:
        scene = _draft(rng, corner)
        if scene is None or decide(scene).action != target:
            continue
        pairs = bool(held_out_pairs(scene))
        if (pairs and not held_out) or (must_hold_out and not pairs):
            continue
        return scene


def held_out_pairs(scene: Scene) -> list[tuple[str, str]]:
    """The held-out (kind, colour) and (kind, weather) pairs of a scene."""
    colours = [(t.kind, t.colour) for t in scene.things if t.colour]
    weathers = [(t.kind, scene.weather) for t in scene.things]
    return [p for p in colours if p in HELD_OUT_COLOURS] + [p for p in weathers if p in HELD_OUT_WEATHER]


def decide(scene: Scene) -> Decision:
    """The driving rules, most binding first. Everything they read can be seen in the image."""
    for kind in ("red light", "stop sign"):
        if cause := _find(scene, kind=kind):
            return Decision("stop", cause)
    if (ahead := _find(scene, position="ahead", on_road=True)) is not None:
        return _decide_ahead(scene, ahead)
    for kind in ("yellow light", "warning sign"):
        if cause := _find(scene, kind=kind):
            return Decision("slow down", cause)
    return Decision("keep speed" if scene.weather == "clear" else "slow down", None)


def _decide_ahead(scene: Scene, ahead: Thing) -> Decision:
    if ahead.role == "living":
        return Decision("give way", ahead)
    if ahead.role == "vehicle":
        return Decision("slow down" if ahead.distance == "near" else "follow at a distance", ahead)
    for side in ("left", "right"):
        if _find(scene, position=side, on_road=True) is None:
            return Decision(f"change to the {side} lane", ahead)
    return Decision("stop", ahead)


def _find(scene: Scene, **wanted: object) -> Thing | None:
    matches = (t for t in scene.things if all(getattr(t, name) == value for name, value in wanted.items()))
    return next(matches, None)


def _draft(rng: Random, corner: bool) -> Scene | None:
    """One draw without any wish for its action; None when there are too few or too many objects."""
    weather = rng.choice(WEATHERS)
    rare_object = corner and rng.random() < _RARE_OBJECT_SHARE
    if corner and not rare_object:
        weather = RARE_WEATHER
    kinds = _draw_kinds(rng, rare_object)
    on_road = [k for k in kinds if KINDS[k].role not in ("sign", "light")]
    if not 2 <= len(kinds) <= 4 or len(on_road) > 3:
        return None
    lanes: list[Position] = rng.sample(("left", "ahead", "right"), 3)
    posts: list[Position] = rng.sample(("left", "right"), 2)
    things = []
    for kind in kinds:
        role = KINDS[kind].role
        if role == "light" and rng.random() < 0.4:
            position: Position = "ahead"
        else:
            position = (posts if role in ("sign", "light") else lanes).pop()
        things.append(_place(rng, kind, position))
    return Scene(weather, corner, rng.uniform(-1, 1), tuple(things), rng.getrandbits(32))


def _draw_kinds(rng: Random, rare_object: bool) -> list[str]:
    kinds = []
    for group in GROUPS:
        rare = rare_object and group == "other_objects"
        if rare or rng.random() < _PRESENCE[group]:
            choices = [name for name, kind in KINDS.items() if kind.group == group and kind.rare == rare]
            kinds.append(_weighted(rng, choices, _KIND_WEIGHT))
            if group == "vehicles" and rng.random() < _SECOND_VEHICLE:
                kinds.append(rng.choice([c for c in choices if c != kinds[-1]]))
    return kinds


def _weighted(rng: Random, choices: Sequence[str], weights: Mapping[str, float]) -> str:
    return rng.choices(choices, [weights.get(choice, 1.0) for choice in choices])[0]


def _place(rng: Random, kind: str, position: Position) -> Thing:
    role = KINDS[kind].role
    distance: Distance = rng.choice(("near", "far"))
    depths: dict[str, tuple[float, float]] = _POST_DEPTH_M if role in ("sign", "light") else _DEPTH_M
    return Thing(
        kind=kind,
        position=position,
        distance=distance,
        colour=rng.choice(COLOURS) if role == "vehicle" else None,
        depth_m=rng.uniform(*depths[distance]),
        offset_m=rng.uniform(-0.25, 0.25),
        mirrored=rng.random() < 0.5,
    )


def pick_regions(rng: Random, things: Sequence[Thing]) -> list[Thing]:
    """One to three objects to ask about, rare kinds first and the rest so that categories come out even."""
    count = min(len(things), rng.choice((1, 2, 2, 3)))
    # Efraimidis & Spirakis 2006: the largest u^(1/w) are a weighted draw without replacement.
    keyed = [
        (not KINDS[t.kind].rare, -(rng.random() ** (1 / _REGION_WEIGHT[t.group])), i) for i, t in enumerate(things)
    ]
    return [things[i] for *_, i in sorted(keyed)[:count]]


_REGION_WEIGHT = {
    "vehicles": 1.6,
    "vulnerable_road_users": 1.2,
    "traffic_signs": 1.2,
    "traffic_lights": 1.2,
    "traffic_cones": 0.5,
    "barriers": 0.8,
    "other_objects": 0.6,
}
