"""Commands for people who look after a store.

    clkd store {verify,inspect,stats} RECIPE.yaml
    clkd store merge RECIPE.yaml --from URL [--from URL ...]
    clkd store export RECIPE.yaml --out DIR

`merge` copies what the recipe's store lacks from stores of the same identity, so it also moves a store to or from an
object store. `export` writes Parquet.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.data.index.samples import sample_ids
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import ConfigError, UserError
from pipeline.recipe import Recipe
from pipeline.targets.answers import AnswerStore
from pipeline.targets.container.folders import folder_at
from pipeline.targets.container.manifest import kinds_of, read_parts, refuse_differences
from pipeline.targets.container.reader import DISCARD, StoreReader, damaged_shards
from pipeline.targets.container.shards import Kind, commit_name, committed_shards
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.parquet import export_parquet
from pipeline.targets.pool import open_every, open_training_samples
from pipeline.targets.sketches import SketchStore
from pipeline.targets.store import SoftTargetStore

_READERS: Mapping[Kind, type[StoreReader]] = {
    "targets": SoftTargetStore,
    "sketches": SketchStore,
    "answers": AnswerStore,
}
_MASS_EDGES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
_CERTAINTY_EDGES = (0.5, 0.7, 0.8, 0.9, 0.95)
_DRAWN_EDGES = (2, 3, 5, 9, 17, 33, 65)


def merge(url: str | Path, sources: Sequence[str], shard_samples: int) -> int:
    """Copy what a store lacks from others, checking every byte. After a kill, the same command goes on.

    Returns:
        Samples copied.

    Raises:
        StoreError: stores of different identities (nothing was changed), or damage in a source.
    """
    stores = [{kind: reader.open(source, None) for kind, reader in _READERS.items()} for source in sources]
    identity = stores[0]["targets"].identity
    for store in stores:
        refuse_differences(store["targets"].folder, store["targets"].identity, identity)
    writer = StoreWriter(url, identity)
    holder = {i: store for store in reversed(stores) for i in store["targets"].sample_ids}
    ids = list(dict.fromkeys(i for store in stores for i in store["targets"].sample_ids))
    origin = [part["dataset"] for store in stores for part in read_parts(store["targets"].folder)]
    committed = writer.committed()[0]
    planned = writer.plan(ids, shard_samples, ", ".join(dict.fromkeys(origin)), committed)
    todo = {shard: planned[shard] for shard in planned if shard not in committed}
    for shard, members in tqdm(todo.items(), desc="merge", unit="shard", disable=None):
        for kind in reversed(writer.kinds):  # the soft targets last, as the teacher does
            # Answers are there for questions alone.
            having = [i for i in members if kind != "answers" or i in holder[i][kind]]
            read = [(i, *holder[i][kind].read_record(i)) for i in having]
            writer.write_shard(shard, [(i, rows, raw) for i, raw, rows in read], kind)
    return sum(map(len, todo.values()))


def _verify(recipe: Recipe, options: argparse.Namespace) -> int:
    folder, problems = folder_at(recipe.store_url), damaged_shards(recipe.store_url)
    for (shard, kind), problem in problems.items():
        print(problem)
        if options.discard:
            folder.remove(commit_name(shard, kind))
    whole = set(committed_shards(folder, "targets")) - {shard for shard, _ in problems}
    print(f"{folder}: {len(whole)} shard(s) whole, {len({shard for shard, _ in problems})} damaged")
    if problems:
        print("dropped; the teacher pass rebuilds them" if options.discard else DISCARD)
    return 1 if problems else 0


def _inspect(recipe: Recipe, options: argparse.Namespace) -> int:
    store = SoftTargetStore.open(recipe.store_url, None)
    for key, value in store.identity.items():
        print(f"{key:24} {value}")
    planned = sum(len(part["sample_ids"]) for part in read_parts(store.folder))
    size, tokens = sum(r.bytes for r in store.commits), sum(r.rows for r in store.commits)
    print(f"{len(store.commits)} shard(s), {len(store)} of {planned} samples")
    print(f"{tokens} tokens, {size} bytes")
    if not len(store):
        return 0
    sample_id = options.sample or store.sample_ids[0]
    targets, processor = store.read(sample_id), Processor.load(recipe.processor_dir, recipe.data)
    what = "most often drawn first, in % of the draws" if targets.sampled else "most probable first, in %"
    print(f"sample {sample_id}: {len(targets)} answer tokens; {what}")
    sample = next((s for s in _data(recipe, answered=True) if s.sample_id == sample_id), None)
    gold = _show_sample(sample, processor) if sample else [""] * len(targets)
    names = processor.tokenizer.convert_ids_to_tokens
    for row in range(len(targets)):
        chances = [chance for chance in targets.logprobs[row, :5].exp().mul(100).tolist() if chance > 0]
        pairs = zip(names(targets.ids[row, : len(chances)].tolist()), chances, strict=True)
        tail, entropy = 100 * targets.tail_logprob[row].exp(), targets.entropy[row]
        shown = "  ".join(f"{name!r} {chance:.1f}" for name, chance in pairs)
        its_own = f"{gold[row]!r:>14} {100 * targets.gold_logprob[row].exp():5.1f}" if sample else ""
        print(f"{row:4}  H {entropy:5.2f}  tail {tail:5.2f}  {its_own}  | {shown}")
    return 0


def _show_sample(sample: Sample, processor: Processor) -> list[str]:
    """Print the sample's text; the tokens of its answer, which head the rows."""
    print(f"images: {', '.join(map(str, sample.images))}\nprompt: {sample.prompt}\nanswer: {sample.answer}")
    print("each row: the answer's own token with its probability | what the teacher holds probable")
    encoded = processor.encode(sample)
    answer = encoded.labels[encoded.labels >= 0].tolist()
    return list(processor.tokenizer.convert_ids_to_tokens(answer))


def _data(recipe: Recipe, *, answered: bool = False) -> Sequence[Sample]:
    """What the teacher pass covers; of questions, `answered` ones that are trained on. None: not on this machine."""
    try:
        if answered and recipe.targets.answers is not None:
            return open_training_samples(recipe, Processor.load(recipe.processor_dir, recipe.data))
        return open_every(recipe)
    except UserError as error:
        print(f"without the data set: {error}")
        return []


def _stats(recipe: Recipe, options: argparse.Namespace) -> int:
    store = SoftTargetStore.open(recipe.store_url, None)
    sampled = store.identity["codec"] == "sampled"
    edges = torch.tensor(_DRAWN_EDGES if sampled else _MASS_EDGES)
    tokens, sums = 0, torch.zeros(4, dtype=torch.float64)
    histogram = torch.zeros(len(edges) + 1, dtype=torch.int64)
    for sample_id in tqdm(store.sample_ids, desc="read", unit="sample", disable=None):
        targets = store.read(sample_id)
        mass = targets.logprobs.isfinite().sum(dim=1).float() if sampled else 1 - targets.tail_logprob.exp()
        spread = mass if sampled else targets.tail_logprob.exp()
        kept = [targets.logprobs[:, 0].exp(), spread]
        sums += torch.stack([targets.entropy, -targets.gold_logprob, *kept]).double().sum(dim=1)
        histogram += torch.bincount(torch.bucketize(mass, edges, right=True), minlength=len(histogram))
        tokens += len(targets)
    names = ("largest share", "ids drawn") if sampled else ("top-1 probability", "tail mass")
    for name, mean in zip(
        ("entropy (nats)", "cross-entropy (nats)", *names), (sums / max(tokens, 1)).tolist(), strict=True
    ):
        print(f"{name:22} {mean:.4f}")
    print(f"{'tokens per sample':22} {tokens / max(len(store), 1):.1f}")
    print(f"{'bytes per token':22} {sum(r.bytes for r in store.commits) / max(tokens, 1):.1f}")
    print(f"tokens by {'ids drawn' if sampled else 'mass of the kept entries'}:")
    _print_histogram(edges.tolist(), histogram / max(tokens, 1))
    data = _data(recipe)
    if "answers" in kinds_of(store.identity):
        _print_answers(AnswerStore.open(recipe.store_url, None))
    if data:
        missing = store.missing(sample_ids(data))
        print(f"coverage               {len(data) - len(missing)} of {len(data)} samples of the training split")
        print(f"beyond it              {len(store) - len(data) + len(missing)} samples")
    return 0


def _print_answers(store: AnswerStore) -> None:
    answers = [store.read(sample_id) for sample_id in store.sample_ids]
    left_out = Counter(why for answer in answers if (why := answer.left_out(0.0)) is not None)
    certain = torch.tensor([answer.certainty for answer in answers if answer.left_out(0.0) is None])
    unusable = "".join(f", {count} {why}" for why, count in sorted(left_out.items()))
    print(f"answers of the teacher {len(answers)}{unusable}; the others by certainty:")
    counts = torch.bincount(torch.bucketize(certain, torch.tensor(_CERTAINTY_EDGES), right=True), minlength=6)
    _print_histogram(_CERTAINTY_EDGES, counts / max(len(certain), 1))


def _print_histogram(edges: Sequence[float], shares: torch.Tensor) -> None:
    bounds = ["", *(f"{edge:g}" for edge in edges), ""]
    for below, above, share in zip(bounds[:-1], bounds[1:], shares.tolist(), strict=True):
        label = f"{f'>= {below}' if below else '':10} {f'< {above}' if above else ''}"
        print(f"  {label:20} {100 * share:5.1f} %  {'#' * round(50 * share)}")


def _merge(recipe: Recipe, options: argparse.Namespace) -> int:
    if not options.sources:
        raise ConfigError("merge: name the stores to copy from with --from URL. Nothing was changed.")
    copied = merge(recipe.store_url, options.sources, recipe.targets.shard_samples)
    print(f"{recipe.store_url}: {copied} samples copied from {len(options.sources)} store(s)")
    return 0


def _export(recipe: Recipe, options: argparse.Namespace) -> int:
    if options.out is None:
        raise ConfigError("export: name a folder with --out DIR. Nothing was written.")
    store = SoftTargetStore.open(recipe.store_url, None)
    data = {sample.sample_id: sample for sample in _data(recipe, answered=True)}
    files = export_parquet(store, options.out, data)
    print(f"{options.out}: {len(store)} samples in {len(files)} Parquet file(s), read back and compared")
    return 0


_ACTIONS = {"verify": _verify, "inspect": _inspect, "stats": _stats, "merge": _merge, "export": _export}


def main(recipe: Recipe, options: argparse.Namespace) -> int:
    """The command `store`. Returns 1 when `verify` finds damage."""
    return _ACTIONS[options.action](recipe, options)
