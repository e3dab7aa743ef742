"""Ops that answer: generate, eval_model, cli_chat, mpt_original_forward."""

import contextlib
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check
from tests.conformance.ops.vision import LIMITED_ATOL, LOGITS_ATOL, loaded, make_inputs

CLEAR_GAP = 3e-4  # a greedy step whose best two logits are nearer than this may go either way


def generate(case: Case, workshop: Workshop, check: Check) -> None:
    model = loaded(workshop)
    if case.raises:
        check.raises(case.raises, lambda: _generate(case, workshop))
        return
    output = _generate(case, workshop)
    check.equal("input_ids", make_inputs(case, workshop).rows, case.expect["input_ids"])
    rows = output.sequences.tolist()
    if "sequences_scores" in case.expect:
        compare_beams(check, case, workshop, rows, output.sequences_scores.tolist())
    else:
        compare_greedy(check, rows, case.expect["sequences"], case.expect["step_gaps"])
    if rows == case.expect["sequences"]:
        text = model.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        check.equal("text", text, case.expect["text"])


def _generate(case: Case, workshop: Workshop) -> Any:
    from llava.mm_utils import KeywordsStoppingCriteria

    model, inputs = loaded(workshop), make_inputs(case, workshop)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 24, "use_cache": True}
    options |= case.given.get("kwargs", {})
    if inputs.attention_mask is not None:
        options["attention_mask"] = inputs.attention_mask
    if inputs.position_ids is not None:
        options["position_ids"] = inputs.position_ids
    if "stop" in case.given:
        criteria = KeywordsStoppingCriteria(case.given["stop"], model.tokenizer, inputs.input_ids)
        options["stopping_criteria"] = [criteria]
    with torch.inference_mode():
        return model.model.generate(
            inputs.input_ids,
            images=inputs.images,
            image_sizes=inputs.image_sizes,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def compare_greedy(
    check: Check, rows: list[list[int]], expected: list[list[int]], gaps: list[list[float]]
) -> None:
    """Equal up to the first step that could have gone either way; element 0 is the extra BOS."""
    check.equal("rows", len(rows), len(expected))
    for i, (row, wanted, row_gaps) in enumerate(zip(rows, expected, gaps, strict=True)):
        doubtful = next((j for j, gap in enumerate(row_gaps) if gap < CLEAR_GAP), None)
        end = None if doubtful is None else doubtful + 1
        check.equal(f"sequence {i}", row[:end], wanted[:end])


def compare_beams(
    check: Check, case: Case, workshop: Workshop, rows: list[list[int]], scores: list[float]
) -> None:
    """Equal, or at least as good as the original's by its own score."""
    limit = workshop.spec.get("logit_limit")
    atol = LIMITED_ATOL if limit else LOGITS_ATOL
    check.close("sequences_scores", scores, case.expect["sequences_scores"], atol=atol)
    if not limit:
        differing = rows != case.expect["sequences"]
        if differing and not check.failures:  # the score is the same: a tie that went the other way
            check.note("a tie of beams", 0.0, 0.0)
        elif differing:
            check.equal("sequences", rows, case.expect["sequences"])
    else:
        check.equal("sequences", rows, case.expect["sequences"])


@contextlib.contextmanager
def loader_replaced(module: Any, workshop: Workshop) -> Iterator[None]:
    """Entry points load by themselves; the golden numbers come from a model handed to them."""
    model = loaded(workshop)
    with mock.patch.object(module, "load_pretrained_model", return_value=tuple(model)):
        yield


def eval_model(case: Case, workshop: Workshop, check: Check) -> None:
    import llava.eval.run_llava as run_llava

    given = case.given
    workshop.pictures(given["images"])  # skips when one is not here
    separator = given.get("sep", ",")
    args = SimpleNamespace(
        model_path=given.get("model_name", workshop.checkpoint()["model_path"]),
        model_base=workshop.checkpoint()["model_base"],
        model_name=given.get("model_name"),
        query=given["query"],
        conv_mode=given.get("conv_mode"),
        image_file=separator.join(str(workshop.variant.images / n) for n in given["images"]),
        sep=separator,
        temperature=0,
        top_p=None,
        num_beams=given.get("num_beams", 1),
        max_new_tokens=given.get("max_new_tokens", 24),
    )
    out = io.StringIO()

    def answer() -> None:
        with loader_replaced(run_llava, workshop), contextlib.redirect_stdout(out):
            run_llava.eval_model(args)

    if case.raises:
        check.raises(case.raises, answer)
        return
    answer()
    check.equal("stdout", out.getvalue(), case.expect["stdout"])
    check.equal("conv_mode", args.conv_mode, case.expect["conv_mode"])


def cli_chat(case: Case, workshop: Workshop, check: Check) -> None:
    import llava.serve.cli as cli

    workshop.picture(case.given["image"])
    made = workshop.checkpoint()
    args = SimpleNamespace(
        model_path=made["model_path"],
        model_base=made["model_base"],
        image_file=str(workshop.variant.images / case.given["image"]),
        device="cpu",
        conv_mode=None,
        temperature=0,
        max_new_tokens=16,
        load_8bit=False,
        load_4bit=False,
        debug=True,
    )
    out, asked = io.StringIO(), []
    lines = iter(case.given["lines"])

    def typed(question: str = "") -> str:
        asked.append(question)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def chat() -> None:
        with (
            loader_replaced(cli, workshop),
            mock.patch("builtins.input", typed),
            contextlib.redirect_stdout(out),
        ):
            cli.main(args)

    if case.raises:
        check.raises(case.raises, chat)
        return
    chat()
    check.equal("stdout", out.getvalue(), case.expect["stdout"])
    check.equal("asked", asked, case.expect["asked"])
    check.equal("conv_mode", args.conv_mode, case.expect["conv_mode"])
    for turn in case.expect["turns"]:
        shown = str({"prompt": turn["prompt"], "outputs": turn["outputs"]})
        check.that(shown in out.getvalue(), f"turn {turn['prompt'][-40:]!r} is not in the output")


def mpt_original_forward(case: Case, workshop: Workshop, check: Check) -> None:
    inputs = make_inputs(case, workshop)
    model = loaded(workshop).model
    check.raises(case.raises or "", lambda: model(inputs.input_ids, images=inputs.images))
    check.differs = "2"
