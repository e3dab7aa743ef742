"""The loss of imitation against its formula, and rows of different lengths side by side."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.checkpoint.read.assemble import build_model
from lapilli.errors import ConfigError, DataError, PromptError
from lapilli.nn.linear import rounded
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.prompt.message import Message
from lapilli.prompt.template import TEMPLATES
from lapilli.train.build import replace_projector
from lapilli.train.data import EncodedSample, Sample, SampleEncoder
from lapilli.train.distill import (
    DistillationBatch,
    DistilledModel,
    PairEncoder,
    Teacher,
    check_vocabulary,
    distillation_loss,
    matched,
    with_teacher,
)
from lapilli.train.recipe import DistillRecipe
from lapilli.train.trainer.model import TrainedModel, supervised
from lapilli.train.trainer.task import collate, collate_packed
from pebble.draw import draw
from pebble.sample import sample_scene

VICUNA = TEMPLATES["vicuna_v1"]


def random(seed, *shape, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(2, 9), st.floats(0.3, 8), st.floats(0, 1))
def test_distillation_loss_equals_its_formula(seed, positions, vocabulary, temperature, weight):
    student, teacher = (
        random(seed, positions, vocabulary),
        random(seed + 100, positions, vocabulary),
    )
    targets = torch.arange(positions) % vocabulary
    states = random(seed + 1, positions, 4), random(seed + 2, positions, 4)
    found = distillation_loss(
        student,
        teacher,
        targets,
        temperature=temperature,
        weight=weight,
        hidden=states,
        hidden_weight=0.25,
    )
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    kl = temperature**2 * (p * np.log(p / q)).sum()
    ce = -np.log(softmax(student.numpy())[np.arange(positions), targets.numpy()]).sum()
    a, b = (one.numpy() for one in states)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected = (1 - weight) * ce + weight * kl + 0.25 * (1 - cosines).sum()
    assert found.imitation.item() == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert found.answers.item() == pytest.approx(ce, rel=1e-9)
    assert found.hidden.item() == pytest.approx((1 - cosines).sum(), rel=1e-9, abs=1e-12)
    assert found.total.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.imitation >= -1e-12


@given(st.integers(0, 99), st.floats(0.3, 8))
def test_an_equal_teacher_gives_no_gradient(seed, temperature):
    logits = random(seed, 4, 7).requires_grad_()
    shifted = logits.detach() + random(seed + 1, 4, 1)  # the same distribution
    targets = torch.zeros(4, dtype=torch.long)
    found = distillation_loss(logits, shifted, targets, temperature=temperature, weight=1.0)
    found.total.backward()
    assert found.total.item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-9, rtol=0)


@given(st.integers(0, 99), st.floats(0.5, 5), st.floats(0, 1))
def test_distillation_gradient_equals_its_formula(seed, temperature, weight):
    """(1 - w)(softmax(s) - onehot) + w T (softmax(s / T) - softmax(t / T))."""
    student = random(seed, 3, 5).requires_grad_()
    teacher = random(seed + 7, 3, 5).requires_grad_()
    targets = torch.tensor([4, 0, 2])
    distillation_loss(
        student, teacher, targets, temperature=temperature, weight=weight
    ).total.backward()
    s, t = student.detach().numpy(), teacher.detach().numpy()
    expected = (1 - weight) * (softmax(s) - np.eye(5)[targets.numpy()])
    expected += weight * temperature * (softmax(s / temperature) - softmax(t / temperature))
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-9)
    assert teacher.grad is None


def test_hidden_state_loss_reaches_the_student_alone():
    ours, theirs = random(1, 3, 4).requires_grad_(), random(2, 3, 4).requires_grad_()
    logits, targets = random(3, 3, 5), torch.zeros(3, dtype=torch.long)
    distillation_loss(
        logits, logits, targets, hidden=(ours, theirs), hidden_weight=1.0
    ).total.backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None


def row(length, answers, start=1):
    """A picture of `length` positions after the first token, then pairs (text, answer)."""
    ids, mask = [1] + [0] * length, [False] * (1 + length)
    for number, size in enumerate(answers):
        ids += [100 + number, *range(10 * number, 10 * number + size)]
        mask += [False] + [True] * size
    return EncodedPrompt(ids, mask, (Span(0, start, length),))


@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_matched_prompts_supervise_the_same(ours, theirs, answers, end):
    student, teacher = row(ours, answers), row(theirs, answers)
    end = max(len(student) - end, student.loss_mask.index(True) + 1)
    short = EncodedPrompt(student.input_ids[:end], student.loss_mask[:end], student.spans)
    found = matched(short, teacher)
    batches = [
        collate([EncodedSample(EncodedPrompt(p.input_ids, p.loss_mask, ()))])
        for p in (short, found)
    ]
    targets = [supervised(batch.input_ids, batch.loss_mask)[1].tolist() for batch in batches]
    assert targets[0] == targets[1] != []
    assert found.loss_mask[-1]


def test_other_tokens_are_refused():
    with pytest.raises(PromptError, match=r"token 2 of 3 is 2 in the student's row and missing"):
        matched(row(2, [3]), row(4, [2]))
    other = row(4, [3])
    other = EncodedPrompt([*other.input_ids[:-1], 77], other.loss_mask, other.spans)
    with pytest.raises(PromptError, match=r"is 2 in the student's row and 77 in the teacher's"):
        matched(row(2, [3]), other)


@pytest.fixture(scope="module")
def pebble() -> Loaded:
    return load_checkpoint("pebble", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Loaded:
    """pebble with 16 positions for a picture."""
    path = tmp_path_factory.mktemp("short") / "llava"
    replace_projector("pebble", path, projector="pool2x2_mlp2x_gelu")
    return load_checkpoint(path, device="cpu", dtype="float32")


def samples():
    texts = [("What is this?", "A red star.", "Sure?", "Yes."), ("How many?", "Three objects.")]
    made = []
    for number, turns in enumerate(texts):
        picture = draw(sample_scene(5 + number, "objects"))
        messages = [Message.user(turns[0], picture), Message.assistant(turns[1])]
        for i in range(2, len(turns), 2):
            messages += [Message.user(turns[i]), Message.assistant(turns[i + 1])]
        made.append(Sample(str(number), tuple(messages), f"test:{number}"))
    return made


def encoder(loaded, max_length=None):
    return SampleEncoder(loaded.tokenizer, VICUNA, loaded.model, max_length)


def lesson(student, teacher, *, packed=False):
    pairs = PairEncoder(encoder(student), encoder(teacher))
    rows = [pairs.encode(sample) for sample in samples()]
    batch = collate_packed([rows]) if packed else collate(rows)
    made = with_teacher(batch, rows)
    assert isinstance(made, DistillationBatch)
    return made


@pytest.mark.slow
def test_a_batch_holds_samples_of_student_and_teacher(short, pebble):
    batch = lesson(short, pebble)
    assert [span.length for span in batch.spans] == [16, 16]
    assert [span.length for span in batch.teacher.spans] == [64, 64]
    one = supervised(batch.input_ids, batch.loss_mask)[1]
    assert torch.equal(one, supervised(batch.teacher.input_ids, batch.teacher.loss_mask)[1])
    assert len(one) == batch.num_valid


def test_heads_see_rounded_numbers_of_positions(short, pebble):
    counts = []
    heads = [loaded.model.language_model.lm_head for loaded in (short, pebble)]
    hooks = [
        head.register_forward_pre_hook(lambda _, x: counts.append(len(x[0]))) for head in heads
    ]
    messages = (Message.user("Say it."), Message.assistant("A red star, and a blue one. " * 9))
    pairs = PairEncoder(encoder(short), encoder(pebble))
    rows = [pairs.encode(Sample("0", messages, "test:0"))]
    batch = with_teacher(collate(rows), rows)
    with torch.no_grad():
        model(short, pebble).train()(batch)
    for hook in hooks:
        hook.remove()
    assert batch.num_valid != rounded(batch.num_valid)
    assert counts == [rounded(batch.num_valid)] * 2


def test_samples_without_a_teacher_make_a_plain_batch(pebble):
    rows = [encoder(pebble).encode(sample) for sample in samples()]
    batch = collate(rows)
    assert with_teacher(batch, rows) is batch


def test_a_sample_that_the_teacher_renders_otherwise_is_named(pebble):
    other = SampleEncoder(pebble.tokenizer, TEMPLATES["plain"], pebble.model)
    with pytest.raises(DataError, match=r"test:1.*same template and vocabulary"):
        PairEncoder(encoder(pebble), other).encode(samples()[1])


def model(loaded, teacher, **values):
    return DistilledModel(loaded.model, Teacher(teacher.model), DistillRecipe(teacher="", **values))


@pytest.mark.slow
def test_a_teacher_equal_to_the_student_leaves_the_loss_of_the_data(pebble):
    batch = lesson(pebble, pebble)
    teacher = load_checkpoint("pebble", device="cpu", dtype="float32")
    distilled = model(pebble, teacher, weight=0.25, hidden_weight=1.0)
    found, plain = distilled.train()(batch), TrainedModel(pebble.model).train()(batch)
    assert found.parts["imitation"].item() == pytest.approx(0, abs=1e-3)
    assert found.parts["hidden"].item() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(found.total, 0.75 * plain.total, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_packed_distillation_batches_have_the_same_loss(short, pebble):
    distilled = model(short, pebble, temperature=2.0, hidden_weight=0.5).train()
    apart, packed = (distilled(lesson(short, pebble, packed=one)) for one in (False, True))
    assert apart.parts["imitation"] > 0.1
    torch.testing.assert_close(packed.total, apart.total, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_few_steps_bring_the_student_nearer(short, pebble):
    distilled = model(short, pebble, weight=1.0).train()
    before = {n: p.clone() for n, p in pebble.model.state_dict().items()}
    short.model.requires_grad_(False)
    projector = short.model.modality("image").projector.requires_grad_(True)
    start = {n: p.clone() for n, p in projector.state_dict().items()}
    optimizer = torch.optim.Adam(projector.parameters(), lr=3e-3)
    batch, losses = lesson(short, pebble), []
    for _ in range(4):
        loss = distilled(batch)
        losses.append(loss.total.item())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    projector.load_state_dict(start)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in pebble.model.state_dict().items())
    names = set(dict(distilled.named_parameters()))
    assert not any("teacher" in name for name in names)


def test_evaluation_asks_no_teacher(short, pebble):
    batch, distilled = lesson(short, pebble), model(short, pebble, hidden_weight=1.0).eval()
    with torch.no_grad():
        assert torch.equal(distilled(batch).total, TrainedModel(short.model).eval()(batch).total)


@pytest.mark.slow
def test_states_of_other_widths_go_through_a_map_that_learns(pebble):
    wide = replace(pebble.config.text, hidden_size=320)
    projector = replace(pebble.config.projector, hidden_size=320)
    config = replace(pebble.config, text=wide, projector=projector)
    student = build_model(config).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    distilled = DistilledModel(
        student, Teacher(pebble.model), DistillRecipe(teacher="", hidden_weight=1.0)
    ).train()
    assert distilled.hidden_map.weight.shape == (256, 320)
    rows = [PairEncoder(encoder(pebble), encoder(pebble)).encode(sample) for sample in samples()]
    distilled(with_teacher(collate(rows), rows)).total.backward()
    assert distilled.hidden_map.weight.grad.abs().sum() > 0
    assert (
        DistilledModel(
            pebble.model, Teacher(pebble.model), DistillRecipe(teacher="", hidden_weight=1.0)
        ).hidden_map
        is None
    )


def test_another_vocabulary_is_refused(pebble):
    check_vocabulary(pebble, pebble)
    config = replace(pebble.config, text=replace(pebble.config.text, vocab_size=1300))
    with pytest.raises(ConfigError, match=r"logits for 1300 tokens, the teacher for 1200"):
        check_vocabulary(replace(pebble, config=config), pebble)
    grown = load_checkpoint("pebble", device="cpu", dtype="float32")
    grown.tokenizer.add_tokens(["<new>"], special=True)
    with pytest.raises(ConfigError, match=r"another vocabulary.*1201 tokens, the teacher 1200"):
        check_vocabulary(grown, pebble)


def test_a_token_that_reads_otherwise_is_named(pebble, monkeypatch):
    other = load_checkpoint("pebble", device="cpu", dtype="float32")
    kind = type(other.tokenizer)
    whole = kind.id_to_token

    def swapped(self, number):
        return "odd" if self is other.tokenizer and number == 700 else whole(self, number)

    monkeypatch.setattr(kind, "id_to_token", swapped)
    with pytest.raises(ConfigError, match=r"as token 700, the teacher 'odd'.*same family"):
        check_vocabulary(pebble, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "distill.temperature is 0.0: expected above 0"),
        ({"weight": 1.5}, "distill.weight is 1.5: expected 0 to 1"),
        ({"hidden_weight": -1.0}, "distill.hidden_weight is -1.0: expected 0 or more"),
    ],
)
def test_values_outside_of_their_range(values, message):
    with pytest.raises(ConfigError, match=message):
        DistillRecipe(teacher="pebble", **values)
