"""A small corpus with real image files, and a processor folder made from it."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.benchmark.tokenizer import save_image_processor, train_tokenizer
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample, question
from pipeline.recipe import DataConfig

DATA: dict[str, object] = {"min_pixels": 1024, "max_pixels": 320 * 192, "max_length": 512, "workers": 0}
"""`data` of recipes whose images have a few tokens."""
COLOURS = ("red", "white", "yellow", "black")
OBJECTS = ("car", "truck", "pedestrian", "traffic cone", "overturned trailer")
PLACES = ("on the left", "in the oncoming lane", "12 m ahead", "at the roadside")
PROMPTS = (
    "Which objects affect the ego car?",
    "Describe the object in the red rectangle, and explain why it matters.",
    "Give a driving suggestion.",
)


def data(**changes: object) -> DataConfig:
    """`DATA`, changed."""
    return DataConfig.model_validate(DATA | changes)


def save_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_sample(images: tuple[Path, ...], *, prompt: str = PROMPTS[0], **changes: object) -> Sample:
    """A question about the images, which come first."""
    values: dict[str, object] = {
        "sample_id": "s0",
        "turns": question(prompt, len(images)),
        "answer": "There is a red car on the left; keep 12 m of distance.\nIt's moving slowly (25 km/h).",
        "task": "general_perception",
        "slice": "regular",
        "box": None,
        "meta": {},
    }
    return Sample(images=images, **(values | changes))


def corpus(image: Path) -> list[Sample]:
    """One sample per colour, object and place."""
    combinations = [(c, o, p) for c in COLOURS for o in OBJECTS for p in PLACES]
    return [
        make_sample(
            (image,),
            sample_id=f"s{i:03d}",
            prompt=PROMPTS[i % len(PROMPTS)],
            answer=f"There is a {colour} {thing} {place}; keep {i} m of distance.\nIt's slow ({i} km/h).",
        )
        for i, (colour, thing, place) in enumerate(combinations)
    ]


def make_processor(folder: Path, *, max_length: int = 512, patch_size: int = 16) -> Processor:
    """Train on the corpus, save in `folder` and load from there."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = corpus(save_image(folder.parent / "corpus.png", 64, 64))
    train_tokenizer(samples, 640, folder, seed=0)
    save_image_processor(folder, patch_size=patch_size, merge_size=2, min_pixels=1024, max_pixels=320 * 192)
    return Processor.load(folder, data(max_length=max_length))
