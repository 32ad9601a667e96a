"""The teacher answers questions, and its answers become samples as those of a record are."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from pipeline.data.collate import IGNORED, Batch, Encoded
from pipeline.data.processor import Processor
from pipeline.errors import DataError
from pipeline.models.generation import Choose, Drawn, continuations, model_inputs, most_probable
from pipeline.recipe import AnswersConfig
from pipeline.targets.answers import Answer
from pipeline.teacher.encoding import Prompt, similar_batches


def answered(
    model: PreTrainedModel,
    processor: Processor,
    questions: Iterable[Sequence[Prompt]],
    settings: AnswersConfig,
    batch_size: int,
) -> tuple[dict[str, Answer], list[Batch]]:
    """(the answers by sample id, batches of the samples with their answers, of similar length).

    An answer from which nothing can be learnt stands in its batch as one token without a label.

    Args:
        model: in evaluation mode, on the device (or devices) that compute.
        questions: those that are asked together.
        batch_size: samples in a batch that is returned.
    """
    answers, encoded = dict[str, Answer](), list[Encoded]()
    for prompts in questions:
        for prompt, answer in zip(prompts, _said(model, processor, prompts, settings), strict=True):
            made, problem = _encoded(processor, prompt, answer)
            answers[prompt.sample.sample_id] = replace(answer, tokens=_last_tokens(made), problem=problem)
            encoded.append(made)
    return answers, similar_batches(encoded, processor, batch_size)


def _said(
    model: PreTrainedModel, processor: Processor, prompts: Sequence[Prompt], settings: AnswersConfig
) -> list[Answer]:
    """What the teacher says to each of a batch."""
    inputs = model_inputs(processor.collate([p.encoded for p in prompts], side="left"), model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    choose: Choose = most_probable
    if settings.temperature > 0:
        ids = [prompt.sample.sample_id for prompt in prompts]
        choose = Drawn(ids, settings.seed, settings.temperature, processor.vocab_size)
    longest = settings.max_new_tokens
    rows = continuations(model, inputs, longest, (processor.eos_id, processor.pad_id), choose)
    # Without blanks at its ends, as a record's answer is read: the chats written from it then hold the same sample.
    return [Answer(processor.decode(row).strip(), finished=len(row) < longest) for row in rows]


def _encoded(processor: Processor, prompt: Prompt, answer: Answer) -> tuple[Encoded, str]:
    """(the sample with the answer, why it cannot be encoded or an empty text)."""
    if not answer.text or not answer.finished:
        return processor.stand_in(prompt.sample, "it has no whole answer"), ""
    sample = replace(prompt.sample, answer=answer.text)
    try:
        return processor.encode_answer(sample, prompt.encoded), ""
    except DataError as error:
        problem = str(error).removeprefix(f"{sample.where}: ")  # the store says the same wherever the data lie
        return processor.stand_in(sample, problem), problem


def _last_tokens(encoded: Encoded) -> int:
    """Labels of the last answer: earlier ones of a conversation stand before the tokens of a question."""
    return int((encoded.labels != IGNORED).flip(0).long().cumprod(dim=0).sum())
