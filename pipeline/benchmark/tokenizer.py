"""The tokenizer of the embedded default: sentencepiece, trained on the corpus, saved as an ordinary folder.

`AutoTokenizer.from_pretrained` loads the folder with no code of ours. Ids are sentencepiece's own, followed
by Qwen's special tokens, one id each, as in Qwen's checkpoints. The image processor's settings lie beside it.

`clkd tokenizer RECIPE.yaml` writes `<run.dir>/processor`. A folder already made from the same corpus and settings is
kept. One made from others is refused, because models and stores use its ids.
"""

import hashlib
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data.sample import Sample
from pipeline.data.special_tokens import END_OF_TEXT, MESSAGE_END, SPECIAL_TOKENS
from pipeline.data.splits import open_split
from pipeline.errors import ConfigError, DataError
from pipeline.files import differences, listed
from pipeline.recipe import Recipe, VisionSize

PROVENANCE_FILE = "tokenizer_provenance.json"
model_pb2: Any = sentencepiece_model_pb2
"""protobuf makes its classes at run time, unseen by type checkers."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""
_WORD = re.compile(rf"{SPACE}?[^\W\d_]+")
"""A word with the space before it: the longest piece there can be. Digits and punctuation stand alone."""
MAX_PIECE_LENGTH = 24
MAX_SEEDS = 1_000_000
TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "unigram",
    "hard_vocab_limit": False,
    "num_threads": 1,  # sums of floats depend on the number of threads
    "byte_fallback": True,
    "character_coverage": 1.0,
    "split_digits": True,
    "max_sentencepiece_length": MAX_PIECE_LENGTH,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "max_sentence_length": 1 << 24,  # longer lines would be dropped silently
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    "minloglevel": 2,
}
TEMPORAL_PATCH_SIZE = 2
"""Qwen-VL repeats a still image over two frames; the model's patch embedding expects it."""

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()
"""Qwen3-VL's dialogue format: optional system text, content as text or as parts, several images, no tools."""


def train_tokenizer(samples: Sequence[Sample], vocab_size: int, out_dir: Path, seed: int) -> PreTrainedTokenizerFast:
    """Train on prompts and answers and save a `transformers` tokenizer folder at `out_dir`.

    Unigram pieces never cross a space, a line break or a digit, so frequent words become one token; what the
    pieces lack is spelled in bytes. The result depends on `samples`, `vocab_size` and `seed` only.

    Args:
        samples: the corpus; every text of it is checked to decode to itself.
        vocab_size: upper bound of the vocabulary, special tokens included. A small corpus gives less.

    Raises:
        ConfigError: vocab_size cannot hold bytes, characters and special tokens.
        DataError: no sample, or a text that the tokenizer cannot give back exactly.
    """
    if not samples:
        raise DataError("tokenizer: there is no sample to train on. Nothing was written.")
    model = _train_sentencepiece(_lines(samples), vocab_size - len(SPECIAL_TOKENS), seed)
    tokenizer = wrap_sentencepiece(model)
    _check_round_trip(tokenizer, samples)
    tokenizer.save_pretrained(str(out_dir))
    (out_dir / "sentencepiece.model").write_bytes(model)
    return tokenizer


def _lines(samples: Iterable[Sample]) -> list[str]:
    """Every line of the corpus. Line breaks are no part of any piece, hence of no training sentence."""
    lines = []
    for sample in samples:
        lines += ["user", "assistant"]
        lines += [line for text in (sample.prompt, sample.answer or "") for line in text.split("\n") if line]
    return lines


def _seed_pieces(lines: Iterable[str]) -> dict[str, int]:
    """Candidate pieces and their counts: whole words and all parts of words that occur at least twice.

    sentencepiece's own seeds come from a suffix array over *distinct* words, which never yields a whole word:
    small vocabularies would then spell frequent words in fragments and have room left over.
    """
    words = Counter(word for line in lines for word in _WORD.findall(line.replace(" ", SPACE)))
    seeds: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word) - 1):
            for end in range(start + 2, min(len(word), start + MAX_PIECE_LENGTH) + 1):
                seeds[word[start:end]] += count
    ordered = sorted(seeds.items(), key=lambda item: (-item[1] * len(item[0]), item[0]))
    return {piece: count for piece, count in ordered[:MAX_SEEDS] if count >= 2}


def _train_sentencepiece(lines: Sequence[str], num_pieces: int, seed: int) -> bytes:
    """Serialized sentencepiece model with at most `num_pieces` pieces, byte pieces included."""
    options = {**TRAINER_OPTIONS, "vocab_size": num_pieces}
    spm.set_random_generator_seed(seed)
    out = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        seeds = _seed_pieces(lines)
        if seeds:
            path = Path(scratch) / "seeds.tsv"
            path.write_text("".join(f"{piece}\t{count}\n" for piece, count in seeds.items()))
            options["seed_sentencepieces_file"] = str(path)
        try:
            spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **options)
        except RuntimeError as error:
            raise ConfigError(
                f"benchmark.vocab_size: {num_pieces + len(SPECIAL_TOKENS)} does not work for this corpus "
                f"({str(error).splitlines()[0]}). 256 byte pieces, the corpus's characters and "
                f"{len(SPECIAL_TOKENS)} special tokens must fit: raise it. Nothing was written."
            ) from None
    model: Any = model_pb2.ModelProto.FromString(out.getvalue())
    model.trainer_spec.ClearField("seed_sentencepieces_file")  # a temporary path: no part of the result
    return bytes(model.SerializeToString(deterministic=True))


def wrap_sentencepiece(serialized: bytes) -> PreTrainedTokenizerFast:
    """The same segmentation and ids as a `transformers` fast tokenizer, special tokens appended."""
    model = spm.SentencePieceProcessor(model_proto=serialized)
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    core = Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Literal "<0x41>" in a text must not match the byte piece of that name.
            pre_tokenizers.Split(Regex(r"<(?=0x)|\n"), behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    options: dict[str, Any] = {
        "pad_token": END_OF_TEXT,
        "eos_token": MESSAGE_END,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (END_OF_TEXT, MESSAGE_END)],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)  # type: ignore[no-untyped-call]


def _check_round_trip(tokenizer: PreTrainedTokenizerFast, samples: Iterable[Sample]) -> None:
    for sample in samples:
        for name, text in (("prompt", sample.prompt), ("answer", sample.answer or "")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            back = tokenizer.decode(ids, skip_special_tokens=True)
            if back != text:
                raise DataError(
                    f"sample {sample.sample_id}: its {name} does not survive tokenizing.\n"
                    f"  text:    {text!r}\n  decoded: {back!r}\n"
                    f"Special tokens such as {MESSAGE_END} and the character U+2581 cannot stand in a text: "
                    "remove them from the data. Nothing was written."
                )


def save_image_processor(
    out_dir: Path, *, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int
) -> Qwen2VLImageProcessorPil:
    """Write Qwen3-VL's `preprocessor_config.json`: bicubic, pixels in [-1, 1].

    Images are scaled to an area in [min_pixels, max_pixels] with sides that are multiples of patch * merge.
    """
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        merge_size=merge_size,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
    )
    processor.save_pretrained(str(out_dir))
    return processor


def vision_patches(recipe: Recipe) -> tuple[int, int]:
    """(patch_size, spatial_merge_size) of all random models of the recipe, which read the same pixels."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, model in recipe.required_benchmark.models.items():
        sizes.setdefault((model.vision.patch_size, model.vision.spatial_merge_size), []).append(name)
    if len(sizes) > 1:
        listing = "; ".join(f"{names}: {patch}, {merge}" for (patch, merge), names in sizes.items())
        raise ConfigError(
            "benchmark.models: teacher and students share one image processor, so vision.patch_size and "
            f"vision.spatial_merge_size must agree: {listing}"
        )
    fields = VisionSize.model_fields
    return next(iter(sizes), (fields["patch_size"].default, fields["spatial_merge_size"].default))


def write_processor(recipe: Recipe, samples: Sequence[Sample]) -> bool:
    """Make `recipe.processor_dir` from the corpus. Returns False if it was there already, made from the same.

    Raises:
        ConfigError: the folder was made from another corpus or other settings, or by something else.
    """
    target, vocab_size = recipe.processor_dir, recipe.required_benchmark.vocab_size
    patch_size, merge_size = vision_patches(recipe)
    image = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "min_pixels": recipe.data.min_pixels,
        "max_pixels": recipe.data.max_pixels,
    }
    provenance = {
        "corpus": _corpus_hash(samples),
        "vocab_size": vocab_size,
        "seed": recipe.run.seed,
        **image,
    }
    if (target / PROVENANCE_FILE).is_file():
        _check_provenance(target, provenance)
        return False
    if target.exists():
        raise ConfigError(f"{target}: exists, but this stage did not make it. Move it away. Nothing was changed.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    train_tokenizer(samples, vocab_size, partial, recipe.run.seed)
    save_image_processor(partial, **image)
    (partial / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
    partial.rename(target)
    return True


def _corpus_hash(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.prompt, sample.answer]).encode())
    return digest.hexdigest()


def _check_provenance(target: Path, wanted: dict[str, Any]) -> None:
    was = json.loads((target / PROVENANCE_FILE).read_text())
    if differs := differences(was, wanted, ("folder", "recipe")):
        raise ConfigError(
            f"{target}: this tokenizer was made from something else.{listed(differs)}\n"
            "Models and soft targets of the run use its ids: choose another run.dir, or remove the run "
            "folder to start over. Nothing was changed."
        )


def main(recipe: Recipe, options: object) -> None:
    """The stage `tokenizer`: train and save one, unless the recipe names an existing one."""
    if recipe.data.processor is not None:
        print(f"tokenizer: the recipe uses {recipe.data.processor}; nothing to train")
        return
    samples = open_split(recipe, recipe.data.train_split)
    made = write_processor(recipe, samples)
    print(f"tokenizer: {recipe.processor_dir} {'written' if made else 'is up to date'} ({len(samples)} samples)")
