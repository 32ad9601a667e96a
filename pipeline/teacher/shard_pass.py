"""One worker's pass over shards: each one is claimed, computed and committed.

Encoding runs ahead in processes, and one thread encodes and writes a shard while the next one is computed. At most one
shard waits to be written, so memory is bounded.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.data.index.samples import from_pool, sample_ids
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.recipe import Recipe
from pipeline.targets import answers, sketches
from pipeline.targets.answers import Answer
from pipeline.targets.container.leases import ShardLeases
from pipeline.targets.container.shards import Bytes, Commit
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.store import write_targets
from pipeline.teacher.answering import answered
from pipeline.teacher.encoding import EncodedWindow, encoded_windows
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
        self.answered = 0
        """Questions that the teacher has answered."""
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
            for window in windows:
                done.add(self._outputs(window))
                if len(done.targets) == len(self.todo[window.shard]):
                    self._finish_writing()
                    self._writing = self._pool.submit(self._commit, window.shard, done)
                    done = Outputs()
            self._finish_writing()
        assert not done.targets, "a shard was left half done"

    def _outputs(self, window: EncodedWindow) -> Outputs:
        """Of a window's samples; questions are answered first, and then samples as all others."""
        settings, outputs, batches = self.recipe.targets, Outputs(), window.batches
        if settings.answers is not None and window.questions:
            said, more = answered(self.model, self.processor, window.questions, settings.answers, settings.batch_size)
            outputs.answers, batches = said, [*batches, *more]
        for batch in batches:
            made = batch_outputs(self.model, batch, settings, self.processor.vocab_size)
            outputs.add(made)
            self.cut_tokens += made.cut_tokens
            self._bar.update(len(made.targets))
        for sample_id, answer in outputs.answers.items():
            outputs.left_out.pop(sample_id, None)  # such an answer is counted where the training samples are opened
            certainty = answers.certainty(outputs.targets[sample_id], answer.tokens)
            outputs.answers[sample_id] = replace(answer, certainty=certainty)
        self.answered += len(outputs.answers)
        self.left_out |= outputs.left_out
        return outputs

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
        if "answers" in self.writer.kinds:
            self.writer.write_shard(shard, self._answer_rows(shard, outputs), "answers")
        if "sketches" in self.writer.kinds:
            sketched = [(i, outputs.sketches[i]) for i in ids]
            rows = [(i, len(s.cells_CR) + len(s.tokens_TR), sketches.encode(s)) for i, s in sketched]
            self.writer.write_shard(shard, rows, "sketches")
        commit = write_targets(self.writer, shard, [(i, outputs.targets[i]) for i in ids])
        self._leases.release(shard)
        return commit

    def _answer_rows(self, shard: int, outputs: Outputs) -> list[tuple[str, int, Bytes]]:
        """Records of a shard's questions; of one that could not be asked, why."""
        rows, pool = list[tuple[str, int, Bytes]](), from_pool(self.todo[shard])
        for sample_id in itertools.compress(sample_ids(self.todo[shard]), pool):
            unasked = Answer("", finished=False, problem=outputs.left_out.get(sample_id, ""))
            answer = outputs.answers.get(sample_id, unasked)
            rows.append((sample_id, answer.tokens, answers.encode(answer)))
        return rows

    def _finish_writing(self) -> None:
        """Wait for the shard that is being written, if any; an error in the thread is raised here."""
        if self._writing is None:
            return
        self.commits.append(self._writing.result())
        self._writing = None
        tokens, size = sum(c.rows for c in self.commits), sum(c.bytes for c in self.commits)
        self._bar.set_postfix_str(f"{tokens / self.seconds:.0f} tokens/s, {size / 2**20:.1f} MiB")
