"""What a store was made from, and of: equality of these is what lets a run use it."""

from collections.abc import Sequence

import xxhash

from pipeline.data.index.samples import Index
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.files import weights_hash
from pipeline.recipe import Recipe
from pipeline.targets import answers, sketches
from pipeline.targets.codecs import identity_of, make_spec
from pipeline.targets.container.manifest import Identity
from pipeline.targets.container.shards import FORMAT_VERSION


def expected_identity(recipe: Recipe, processor: Processor) -> Identity:
    """Everything that changes a stored number: what a store for this run must say.

    Prompt, answer and images are not in it: a sample_id is a hash of them.

    Raises:
        UserError: the teacher is not there.
    """
    if not _teacher_is_there(recipe):
        raise UserError(
            f"{recipe.model_dir(recipe.teacher)}: there is no teacher. Train it first, or correct targets.teacher."
        )
    return known_identity(recipe, processor)


def known_identity(recipe: Recipe, processor: Processor) -> Identity:
    """The same as far as it can be told: without the teacher's weights where its folder is not (any more) on disk.

    For who reads a store: it says itself what it was made from.
    """
    weights = {}
    if _teacher_is_there(recipe):
        weights = {"teacher_weights": weights_hash(recipe.model_dir(recipe.teacher))}
    return {
        "format_version": FORMAT_VERSION,
        **identity_of(recipe.targets.codec, make_spec(recipe.targets, processor.vocab_size)),
        **sketches.identity_of(recipe.targets.sketches),
        **answers.identity_of(recipe.targets.answers),
        "temperature": recipe.targets.temperature,
        "dtype": recipe.targets.dtype,
        "matmul_precision": recipe.targets.matmul_precision,
        **weights,
        **{f"processor_{name}": value for name, value in processor.identity().items()},
    }


def _teacher_is_there(recipe: Recipe) -> bool:
    return (recipe.model_dir(recipe.teacher) / "config.json").is_file()


def dataset_fingerprint(samples: Sequence[Sample]) -> str:
    """Hash of all sample ids in order, and so of all prompts, answers and images; the teacher's answers count too."""
    if isinstance(samples, Index):
        return samples.fingerprint
    digest = xxhash.xxh3_128()
    for sample in samples:
        digest.update(f"{sample.sample_id}\n")
    return digest.hexdigest()
