"""One worker's pass over shards: each one is claimed, computed and committed.

Encoding runs ahead in processes, and one thread encodes and writes a shard while the next one is computed. At most one
shard waits to be written, so memory is bounded.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.data.index.samples import sample_ids
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.recipe import Recipe
from pipeline.targets import sketches
from pipeline.targets.container.leases import ShardLeases
from pipeline.targets.container.shards import Commit
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.store import write_targets
from pipeline.teacher.encoding import encoded_windows
from pipeline.teacher.forward import Outputs, batch_outputs


class ShardPass:
    """The shards `todo`, in order, as far as no other worker has them. `run` once."""

    def __init__(
        self,
        recipe: Recipe,
        writer: StoreWriter,
        model: PreTrainedModel,
        processor: Processor,
        todo: Mapping[int, Sequence[Sample]],
    ) -> None:
        self.recipe, self.writer, self.model, self.processor, self.todo = recipe, writer, model, processor, todo
        self.commits: list[Commit] = []
        """Of the soft targets written here."""
        self.cut_tokens = 0
        """Answer tokens left out because of `data.long_answers: cut`."""
        self.left_out: dict[str, str] = {}
        """Samples that could not be encoded, and why; `data.bad_samples: skip`."""
        self._leases = ShardLeases(writer.folder)
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[Commit] | None = None
        self._left = {shard: len(samples) for shard, samples in todo.items()}
        self._bar = tqdm(total=sum(self._left.values()), desc="teacher pass", unit="sample", disable=None)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the pass was made."""
        return time.perf_counter() - self._started

    def run(self) -> None:
        """Write every shard that is free. A user's error leaves the shards committed before it, and no lease."""
        settings = self.recipe.targets
        done = Outputs()
        with self._leases, self._bar, self._pool:
            workers = self.recipe.data.workers
            windows = encoded_windows(self.todo, self.processor, settings.batch_size, workers, self._take)
            for shard, batches in windows:
                for batch in batches:
                    outputs = batch_outputs(self.model, batch, settings, self.processor.vocab_size)
                    done.add(outputs)
                    self.cut_tokens += outputs.cut_tokens
                    self.left_out |= outputs.left_out
                    self._bar.update(len(outputs.targets))
                if len(done.targets) == len(self.todo[shard]):
                    self._finish_writing()
                    self._writing = self._pool.submit(self._commit, shard, done)
                    done = Outputs()
            self._finish_writing()
        assert not done.targets, "a shard was left half done"

    def _take(self, shard: int) -> bool:
        """Claim a shard; False when another worker has it, or has finished it."""
        taken = self._leases.claim(shard)
        if taken and self.writer.is_whole(shard):  # committed since this pass was planned
            self._leases.release(shard)
            taken = False
        if not taken:
            self._left.pop(shard)
            self._bar.total = sum(self._left.values())
        return taken

    def _commit(self, shard: int, outputs: Outputs) -> Commit:
        """Write a shard's files and give its lease back; the soft targets are last, and their commit is returned."""
        ids = sample_ids(self.todo[shard])
        if "sketches" in self.writer.kinds:
            sketched = [(i, outputs.sketches[i]) for i in ids]
            rows = [(i, len(s.cells_CR) + len(s.tokens_TR), sketches.encode(s)) for i, s in sketched]
            self.writer.write_shard(shard, rows, "sketches")
        commit = write_targets(self.writer, shard, [(i, outputs.targets[i]) for i in ids])
        self._leases.release(shard)
        return commit

    def _finish_writing(self) -> None:
        """Wait for the shard that is being written, if any; an error in the thread is raised here."""
        if self._writing is None:
            return
        self.commits.append(self._writing.result())
        self._writing = None
        tokens, size = sum(c.rows for c in self.commits), sum(c.bytes for c in self.commits)
        self._bar.set_postfix_str(f"{tokens / self.seconds:.0f} tokens/s, {size / 2**20:.1f} MiB")
