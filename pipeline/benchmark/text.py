"""What is asked and said about a scene: CODA-LM records in varied questions and compact, checkable answers."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from pipeline.benchmark.art import Box
from pipeline.benchmark.world import GROUPS, Scene, Thing, decide, pick_regions

QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "general": (
        ("Describe the road users and objects that affect the ego car.", "by class"),
        ("What is in front of the ego car that matters for driving?", "plain"),
        ("List every object on and beside the road that the driver should know.", "by class"),
        ("There is an image of traffic. Which objects influence the driving?", "by class"),
        ("Look at the road ahead and name what the driver must watch.", "plain"),
    ),
    "region": (
        ("What is the object inside the red rectangle?", "name"),
        ("Describe the object in the red box and why it matters.", "sentence"),
        ("Which object does the red rectangle mark?", "name"),
        ("Tell what the red box shows and how it affects the ego car.", "sentence"),
    ),
    "suggestion": (
        ("What should the ego car do now?", "action first"),
        ("Give a driving suggestion for this scene.", "action first"),
        ("How should the driver act in this situation?", "reason first"),
        ("Which action is right for the ego car here?", "reason first"),
    ),
}
"""(question, wording of its answer) by task."""
GROUP_TITLES = {group: group.replace("_", " ") for group in GROUPS}
_WHERE = {"left": "on the left", "ahead": "ahead", "right": "on the right"}
_ARTICLES = {"overturned truck": "an", "tyre debris": "some", "fallen cargo": "some"}
_WHY = {
    "vehicle": ("it may brake or change lane", "its path can cross ours"),
    "living": ("it may move into our path", "it needs room"),
    "obstacle": ("it blocks its lane", "it narrows the road"),
    "sign": ("it sets a rule for us", "it must be obeyed"),
    "light": ("it controls our way", "it must be obeyed"),
}


def record(scene: Scene, boxes: Sequence[Box], size: tuple[int, int], rng: Random) -> dict[str, Any]:
    """A CODA-LM record of the scene, with this layout's extra `question` keys."""
    regions = pick_regions(rng, scene.things)
    asked, wording = rng.choice(QUESTIONS["general"])
    asked_action, action_wording = rng.choice(QUESTIONS["suggestion"])
    return {
        "general_perception": {
            **{group: _group_entries(scene, group, rng) for group in GROUPS},
            "description and explanation": describe(scene, wording),
            "question": asked,
        },
        "region_perception": {
            str(number): _region(thing, boxes[scene.things.index(thing)], rng)
            for number, thing in enumerate(regions, 1)
        },
        "driving_suggestion": suggest(scene, action_wording),
        "driving_suggestion_question": asked_action,
        "weather": scene.weather,
        "size": list(size),
        "objects": [_object(scene.things[i], boxes[i]) for i in _far_to_near(scene)],
    }


def unanswered(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's questions, and nothing that answers them."""
    regions = record["region_perception"]
    return {
        "general_perception": {"question": record["general_perception"]["question"]},
        "region_perception": {
            number: {key: region[key] for key in ("box", "question")} for number, region in regions.items()
        },
        "driving_suggestion": None,
        "driving_suggestion_question": record["driving_suggestion_question"],
        "size": record["size"],
    }


def _region(thing: Thing, box: Box, rng: Random) -> dict[str, Any]:
    asked, wording = rng.choice(QUESTIONS["region"])
    why = rng.choice(_WHY[thing.role])
    named = f"{_name(thing)} {_place(thing)}"
    return {
        "description and explanation": f"{named}, {why}." if wording == "name" else f"the box shows {named}: {why}.",
        "box": list(box),
        "category_name": thing.kind,
        "question": asked,
    }


def _far_to_near(scene: Scene) -> list[int]:
    return sorted(range(len(scene.things)), key=lambda i: -scene.things[i].depth_m)


def _object(thing: Thing, box: Box) -> dict[str, Any]:
    """Ground truth of one object, in drawing order: the last one that covers a place is what is seen there."""
    words = [*filter(None, (thing.colour,)), thing.kind, thing.distance, thing.position]
    return {"category_name": thing.kind, "words": words, "box": list(box)}


def describe(scene: Scene, wording: str) -> str:
    """Every object in class order, then the weather; `by class` with the classes' names, `plain` as one sentence."""
    if wording == "plain":
        return f"I see {', '.join(f'{_name(t)} {_place(t)}' for t in scene.things)}; the weather is {scene.weather}."
    parts = []
    for group in GROUPS:
        members = [f"{_name(t)} {_place(t)}" for t in scene.things if t.group == group]
        if members:
            parts.append(f"{GROUP_TITLES[group]}: {' and '.join(members)}.")
    return " ".join([*parts, f"weather: {scene.weather}."])


def suggest(scene: Scene, wording: str) -> str:
    """The rules' action and its reason, in the order that `wording` says (`action first`, `reason first`)."""
    decision = decide(scene)
    if decision.cause is not None:
        reason = f"there is {_name(decision.cause)} {_place(decision.cause)}"
    elif decision.action == "keep speed":
        reason = "our lane is free"
    else:
        reason = f"the weather is {scene.weather}"
    if wording == "reason first":
        return f"{reason}, so {decision.action}."
    return f"{decision.action}, because {reason}."


def _group_entries(scene: Scene, group: str, rng: Random) -> list[dict[str, str]]:
    return [
        {"description": f"{_name(t)} {_place(t)}", "explanation": rng.choice(_WHY[t.role])}
        for t in scene.things
        if t.group == group
    ]


def _name(thing: Thing) -> str:
    """With its article: `a red truck`, `an overturned truck`, `some fallen cargo`."""
    if thing.colour:
        return f"a {thing.colour} {thing.kind}"
    return f"{_ARTICLES.get(thing.kind, 'a')} {thing.kind}"


def _place(thing: Thing) -> str:
    return f"{thing.distance} {_WHERE[thing.position]}"
