import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pipeline.method.losses import (
    WeightNormaliser,
    balance_loss,
    chased_nats,
    cross_entropy_per_token,
    distillation_loss,
    learnability_gate,
    router_entropy,
    router_z_loss,
    sampled_kl_per_token,
    sparse_kl_per_token,
    token_hardness,
    token_tilt,
)
from pipeline.targets.soft_targets import SoftTargets, from_logits

TOKENS, VOCAB = 7, 11


def make_case(tokens=TOKENS, vocab=VOCAB, seed=0):
    """Student logits, teacher logits, labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(tokens, vocab, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(vocab, (tokens,), generator=generator)


def make_targets(teacher, labels, top_k=3, temperature=1.0):
    return from_logits(teacher, labels, top_k, temperature)


def sparse_kl(student, targets, temperature=1.0):
    return sparse_kl_per_token(student, targets.ids, targets.logprobs, targets.tail_logprob, temperature)


def dense_kl(student, teacher, temperature=1.0):
    """torch's own KL over the whole vocabulary, with Hinton's T^2."""
    log_q, log_p = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def gradient(logits, loss):
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return grad


# -- token KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_kl_equals_torch_kl_when_the_tail_is_one_token(temperature):
    student, teacher, labels = make_case()
    targets = make_targets(teacher, labels, VOCAB - 1, temperature)
    expected = dense_kl(student, teacher, temperature)
    torch.testing.assert_close(sparse_kl(student, targets, temperature), expected, rtol=1e-5, atol=1e-6)


def test_sparse_kl_is_a_lower_bound_that_grows_with_k():
    student, teacher, labels = make_case(64, 50)
    rows = [sparse_kl(student, make_targets(teacher, labels, k)) for k in (1, 4, 16, 49)]
    for fewer, more in itertools.pairwise(rows):
        assert torch.all(fewer <= more + 1e-5)
    assert rows[0].sum() < 0.9 * rows[-1].sum()


def test_bf16_logits_are_computed_in_float32():
    student, teacher, labels = (x.bfloat16() if x.is_floating_point() else x for x in make_case(64, 50))
    targets = make_targets(teacher.float(), labels, 49)
    kl = sparse_kl(student, targets)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, dense_kl(student.float(), teacher.float()), rtol=1e-4, atol=1e-5)
    ce = cross_entropy_per_token(student, labels)
    torch.testing.assert_close(ce, F.cross_entropy(student.float(), labels, reduction="none"))


@pytest.mark.parametrize("sharpness", [1.0, 100.0, 1e4])
def test_gradients_stay_finite_for_sharp_students_and_teachers_without_a_tail(sharpness):
    student, teacher, labels = make_case()
    student = (student * sharpness).requires_grad_()
    whole = make_targets(teacher, labels, 2)
    no_tail = SoftTargets(
        whole.ids, whole.logprobs.log_softmax(-1), torch.full((TOKENS,), -math.inf), whole.gold_logprob, whole.entropy
    )
    for targets in (whole, no_tail):
        terms = distillation_loss(student, labels, targets, torch.full((TOKENS,), 0.5), gate_scale=1.0, beta=1.0)
        assert torch.isfinite(terms.loss_sum)
        assert torch.isfinite(gradient(student, terms.loss_sum)).all()
        assert torch.isfinite(terms.hardness_N).all()


def test_tail_of_a_sharp_student_is_not_lost_to_cancellation():
    """The student's tail holds e^-60: 1 - sum q_k would round it to 0 and make the KL infinite."""
    student = torch.zeros(1, VOCAB)
    student[0, 0] = 60.0
    targets = SoftTargets(
        torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), *torch.zeros(2, 1)
    )
    expected = 0.5 * (math.log(0.5) - 0.0) + 0.5 * (math.log(0.5) - (math.log(10) - 60.0))
    assert sparse_kl(student, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_gradient_of_the_sparse_kl_is_that_of_its_definition(sharpness, temperature):
    """Autograd through the definition in float64, coarse-grained distributions written out."""
    student, teacher, labels = make_case(64, 50)
    student = (student * sharpness).requires_grad_()
    targets = make_targets(teacher, labels, 5, temperature)
    exact = student.detach().double().requires_grad_()
    q = (exact / temperature).log_softmax(-1)
    log_q = torch.cat([q.gather(-1, targets.ids), q.scatter(-1, targets.ids, -math.inf).logsumexp(-1)[:, None]], -1)
    log_p = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).double()
    definition = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    ours = sparse_kl(student, targets, temperature)
    torch.testing.assert_close(ours, definition.float(), rtol=1e-5, atol=1e-5)
    rows = torch.linspace(-1, 2, 64)  # rows weigh differently, as under a tilt
    found, wanted = gradient(student, (rows * ours).sum()), gradient(exact, (rows * definition).sum())
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 0.5


def test_top_k_that_leaves_no_tail_is_refused():
    student, teacher, labels = make_case()
    targets = make_targets(teacher, labels, VOCAB - 1)
    with pytest.raises(ValueError, match=r"top_k \(10\) must be smaller than the vocabulary \(10\)"):
        sparse_kl(student[:, :10], targets)


# -- sampled targets ---------------------------------------------------------------------------------------------


def draw(teacher, count, width, seed=0):
    """Sampled targets of `count` draws a row: (ids, log of shares) of the distinct ones, padded with id 0 and -inf."""
    draws = teacher.softmax(-1).multinomial(count, True, generator=torch.Generator().manual_seed(seed))
    ids = torch.zeros(len(draws), width, dtype=torch.int64)
    logprobs = torch.full((len(draws), width), -math.inf)
    for row, drawn in enumerate(draws):
        distinct, counts = drawn.unique(return_counts=True)
        ids[row, : len(distinct)], logprobs[row, : len(distinct)] = distinct, (counts / count).log()
    return ids, logprobs


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_kl_by_brute_force(temperature):
    student, teacher, labels = make_case()
    ids, logprobs = draw(teacher / temperature, 9, 9)
    log_q = (student / temperature).log_softmax(-1)
    expected = []
    for row in range(TOKENS):
        total = sum(
            logprobs[row, k].exp().item() * -log_q[row, ids[row, k]].item() for k in range(9) if logprobs[row, k] > -9
        )
        expected.append(temperature**2 * (total - entropy(teacher[row] / temperature).item()))
    kl = sampled_kl_per_token(student, ids, logprobs, entropy(teacher / temperature), temperature)
    assert kl.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)

    off = torch.full((TOKENS,), -math.inf), torch.zeros(TOKENS), entropy(teacher / temperature)
    targets, alpha = SoftTargets(ids, logprobs, *off, sampled=True), torch.full((TOKENS,), 0.9)
    terms = distillation_loss(student, labels, targets, alpha, temperature=temperature)
    torch.testing.assert_close(terms.kl_N, kl)
    ce = F.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(terms.loss_sum, 0.1 * ce + 0.9 * kl.sum())


def test_sampled_kl_and_its_gradient_are_those_of_the_dense_kl_on_average():
    """4,000 independent draws of 16 tokens; a truncated top 3 of the same teacher is off by far more."""
    student, teacher, labels = make_case(1, 30)
    repeats = 4000
    many = student.repeat(repeats, 1).requires_grad_()
    ids, logprobs = draw(teacher.repeat(repeats, 1), 16, 16)
    kl = sampled_kl_per_token(many, ids, logprobs, entropy(teacher).repeat(repeats))
    student.requires_grad_()
    dense = dense_kl(student, teacher)
    error = kl.std() / repeats**0.5
    assert (kl.mean() - dense[0]).abs() < 4 * error
    grads, wanted = gradient(many, kl.sum()), gradient(student, dense.sum())[0]
    errors = grads.std(0) / repeats**0.5
    assert torch.all((grads.mean(0) - wanted).abs() < 5 * errors + 1e-6)
    assert errors.max() < 0.003
    truncated = gradient(student, sparse_kl(student, make_targets(teacher, labels, 3)).sum())[0]
    assert (truncated - wanted).abs().max() > 0.02


# -- weights -----------------------------------------------------------------------------------------------------


def test_hardness_bounds_the_total_variation():
    """Bretagnolle-Huber: TV <= sqrt(1 - exp(-KL)), checked against TV computed from the distributions."""
    student, teacher, _ = make_case(256, 20)
    hardness = token_hardness(dense_kl(student, teacher))
    variation = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    assert torch.all(variation <= hardness + 1e-6)
    assert torch.all((hardness >= 0) & (hardness < 1))
    assert token_hardness(torch.tensor([0.0, -1e-7, math.log(2)])).tolist() == pytest.approx([0, 0, math.sqrt(0.5)])


def test_hardness_of_the_loss_leaves_out_the_squared_temperature():
    student, teacher, labels = make_case()
    targets = make_targets(teacher, labels, VOCAB - 1, 2.0)
    terms = distillation_loss(student, labels, targets, torch.ones(TOKENS), temperature=2.0)
    plain = dense_kl(student, teacher, 2.0) / 4
    torch.testing.assert_close(terms.hardness_N, (1 - (-plain).exp()).sqrt(), rtol=1e-4, atol=1e-5)


def test_gate_compares_at_one_temperature():
    """Against the gate of both cross-entropies written out at the targets' temperature."""
    student, teacher, labels = make_case(tokens=50)
    for temperature in (1.0, 3.0):
        targets = make_targets(teacher, labels, 4, temperature)
        terms = distillation_loss(
            student, labels, targets, torch.ones(50), temperature=temperature, gate_scale=0.1, beta=0.0
        )
        worse = (student / temperature).log_softmax(-1) - (teacher / temperature).log_softmax(-1)
        worse = worse.gather(-1, labels[:, None])[:, 0]
        expected = (2 / (1 + (worse / 0.1 - 2).exp())).clamp(max=1)
        torch.testing.assert_close(terms.gate_N, expected, rtol=1e-3, atol=1e-6)
        assert 0.1 < float((expected < 1).float().mean()) < 0.9


def test_gate_and_tilt_values():
    gate = learnability_gate(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]), scale=0.5)
    assert gate.tolist() == pytest.approx([1.0, 2 / (1 + math.exp(4))])
    assert token_tilt(torch.tensor([0.0, 0.5, 1.0]), 2.0).tolist() == pytest.approx([math.exp(-2), 1, math.exp(2)])
    assert token_tilt(torch.tensor([0.0, 0.3, 1.0]), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_no_gradient_flows_through_the_weights():
    """Against a loss written out here with constants in the weights' place; the loss value alone would not tell."""
    student, teacher, labels = make_case()
    student.requires_grad_()
    targets, alpha = make_targets(teacher, labels), torch.linspace(0.1, 0.9, TOKENS)
    terms = distillation_loss(student, labels, targets, alpha, gate_scale=0.7, beta=1.3, normaliser=1.7)

    kl, ce = sparse_kl(student, targets), F.cross_entropy(student, labels, reduction="none")
    hardness = (1 - (-kl).exp()).sqrt()
    taught = alpha * (2 * torch.sigmoid((ce + targets.gold_logprob) / 0.7 + 2)).clamp(max=1)
    weights = torch.exp(1.3 * (2 * hardness - 1)) / 1.7
    frozen = ((1 - taught.detach()) * ce + taught.detach() * weights.detach() * kl).sum()
    leaky = ((1 - taught) * ce + taught * weights * kl).sum()
    torch.testing.assert_close(terms.loss_sum, frozen)
    torch.testing.assert_close(gradient(student, terms.loss_sum), gradient(student, frozen), rtol=1e-4, atol=1e-6)
    assert (gradient(student, leaky) - gradient(student, frozen)).abs().max() > 0.1


def test_normaliser_is_the_running_mean_of_earlier_batches():
    normaliser = WeightNormaliser()
    assert normaliser.value == 1.0
    normaliser.update(6.0, 3.0)
    assert normaliser.value == 2.0
    normaliser.update(4.0, 4.0)
    assert normaliser.value == pytest.approx(0.9 * 2.0 + 0.1 * 1.0)
    restored = WeightNormaliser()
    restored.load_state_dict(normaliser.state_dict())
    normaliser.update(0.0, 0.0)  # everything released: nothing to learn from
    assert restored.value == normaliser.value


def test_normaliser_of_vanilla_distillation_is_exactly_one():
    student, teacher, labels = make_case(tokens=301)
    normaliser, alpha = WeightNormaliser(), torch.rand(301)
    for _ in range(50):
        terms = distillation_loss(student, labels, make_targets(teacher, labels), alpha)
        normaliser.update(terms.weighted_sum.item(), terms.plain_sum.item())
    assert normaliser.value == 1.0


@pytest.mark.parametrize("beta", [-1.0, 1.0])
def test_normalised_weights_leave_the_kl_term_its_size(beta):
    """Though nearly all tokens are learnt already, and would pull a plain mean of the weights to theirs."""
    student, teacher, labels = make_case(tokens=200)
    targets = make_targets(teacher, labels)
    student[:190] = teacher[:190]
    everything = torch.ones(200)
    once = distillation_loss(student, labels, targets, everything, gate_scale=1.0, beta=beta)
    normaliser = WeightNormaliser()
    normaliser.update(once.weighted_sum.item(), once.plain_sum.item())
    settings = {"gate_scale": 1.0, "beta": beta, "normaliser": normaliser.value}
    again = distillation_loss(student, labels, targets, everything, **settings)
    plain = distillation_loss(student, labels, targets, everything, gate_scale=1.0)
    torch.testing.assert_close(again.loss_sum, plain.loss_sum)
    assert (again.loss_sum - once.loss_sum).abs() > 0.1


def test_gate_gives_the_data_what_it_takes_from_a_wrong_teacher():
    """Where the teacher is sure of another token the data alone teaches; all else is as without the gate."""
    student, _, labels = make_case()
    teacher = 4 * F.one_hot(labels, VOCAB).float()
    teacher[3] = 40 * F.one_hot((labels[3] + 1) % VOCAB, VOCAB).float()
    student[3] = 0.0
    student.requires_grad_()
    targets, alpha = make_targets(teacher, labels), torch.full((TOKENS,), 0.9)
    gated = gradient(student, distillation_loss(student, labels, targets, alpha, gate_scale=1.0).loss_sum)
    plain = gradient(student, distillation_loss(student, labels, targets, alpha).loss_sum)
    sft = gradient(student, F.cross_entropy(student, labels, reduction="sum"))
    right = torch.arange(TOKENS) != 3
    torch.testing.assert_close(gated[3], sft[3], rtol=1e-4, atol=1e-5)
    assert torch.equal(gated[right], plain[right])
    assert float((plain[3] - sft[3]).abs().max()) > 0.5


# -- the whole loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_targets", [True, False])
def test_alpha_zero_is_exactly_sft(with_targets):
    student, teacher, labels = make_case()
    student.requires_grad_()
    targets = make_targets(teacher, labels) if with_targets else None
    settings = {"gate_scale": 1.0, "beta": 1.0, "normaliser": 0.3}
    terms = distillation_loss(student, labels, targets, torch.zeros(TOKENS), **settings)
    sft = F.cross_entropy(student, labels, reduction="sum")
    assert torch.equal(terms.loss_sum, F.cross_entropy(student, labels, reduction="none").sum())
    torch.testing.assert_close(terms.loss_sum, sft)
    assert torch.equal(gradient(student, terms.loss_sum), gradient(student, sft))
    assert terms.weighted_sum == 0
    assert terms.plain_sum == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_gate_and_tilt_it_is_vanilla_distillation(temperature):
    student, teacher, labels = make_case()
    student.requires_grad_()
    targets = make_targets(teacher, labels, VOCAB - 1, temperature)
    alpha = torch.full((TOKENS,), 0.9)
    terms = distillation_loss(student, labels, targets, alpha, temperature=temperature)
    kl = sparse_kl(student, targets, temperature)
    ours = ((1 - alpha) * cross_entropy_per_token(student, labels) + alpha * kl).sum()
    assert torch.equal(terms.loss_sum, ours)
    assert torch.equal(gradient(student, terms.loss_sum), gradient(student, ours))
    reference = (
        0.1 * F.cross_entropy(student, labels, reduction="sum") + 0.9 * dense_kl(student, teacher, temperature).sum()
    )
    torch.testing.assert_close(terms.loss_sum, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(student, terms.loss_sum), gradient(student, reference), rtol=1e-4, atol=1e-5)


def test_gradient_does_not_depend_on_how_the_batch_is_split():
    """5 + 2 tokens on purpose: equal halves would hide a mean-of-means bug, and so would Adam."""
    student, teacher, labels = make_case()
    targets, alpha = make_targets(teacher, labels), torch.linspace(0, 1, TOKENS)
    labels[2] = -100

    def run(chunks):
        logits = student.clone().requires_grad_()
        sums = torch.zeros(3)
        for rows in chunks:
            terms = distillation_loss(
                logits[rows], labels[rows], targets.rows(rows), alpha[rows], gate_scale=1.0, beta=1.0, normaliser=0.8
            )
            terms.loss_sum.backward()
            sums += torch.stack([(labels[rows] != -100).sum(), terms.weighted_sum, terms.plain_sum]).detach()
        return logits.grad / sums[0], sums

    (whole, whole_sums), (split, split_sums) = run([slice(0, 7)]), run([slice(0, 5), slice(5, 7)])
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(split_sums, whole_sums)
    assert torch.all(whole[2] == 0)  # the row without a label
    kept = torch.arange(TOKENS) != 2
    assert whole_sums[2] == pytest.approx(float((alpha * sparse_kl(student, targets))[kept].sum()))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_fully_masked_batch_backpropagates_zeros(alpha):
    student, teacher, labels = make_case()
    student.requires_grad_()
    masked = torch.full((TOKENS,), -100)
    terms = distillation_loss(
        student, masked, make_targets(teacher, labels), torch.full((TOKENS,), alpha), gate_scale=1.0
    )
    assert terms.loss_sum == 0
    assert torch.all(gradient(student, terms.loss_sum) == 0)
    assert terms.plain_sum == 0


def test_a_batch_without_answer_tokens_still_backpropagates():
    logits = torch.zeros(0, VOCAB, requires_grad=True)
    terms = distillation_loss(logits, torch.zeros(0, dtype=torch.int64), None, torch.zeros(0))
    assert terms.loss_sum == 0
    assert gradient(logits, terms.loss_sum).shape == (0, VOCAB)


def test_released_rows_may_hold_anything_finite():
    student, teacher, labels = make_case()
    student.requires_grad_()
    targets, alpha = make_targets(teacher, labels), torch.tensor([1.0, 0, 1, 0, 1, 0, 1]) * 0.5
    loss = distillation_loss(student, labels, targets, alpha, gate_scale=1.0, beta=1.0).loss_sum
    expected = gradient(student, loss)
    off = alpha == 0
    targets.ids[off] = torch.arange(3)
    targets.logprobs[off], targets.tail_logprob[off], targets.gold_logprob[off] = -math.inf, 0.0, 0.0
    changed = distillation_loss(student, labels, targets, alpha, gate_scale=1.0, beta=1.0).loss_sum
    assert torch.equal(gradient(student, changed), expected)


def test_alpha_without_targets_and_targets_of_other_tokens_are_refused():
    student, teacher, labels = make_case()
    with pytest.raises(ValueError, match="alpha > 0 needs soft targets"):
        distillation_loss(student, labels, None, torch.full((TOKENS,), 0.5))
    targets = make_targets(teacher, labels).rows(slice(0, 5))
    with pytest.raises(ValueError, match="soft targets have 5 rows, the logits have 7"):
        distillation_loss(student, labels, targets, torch.full((TOKENS,), 0.5))


# -- routers -----------------------------------------------------------------------------------------------------


def fractions(logits, valid, top_k):
    """Share of routed assignments by counting one token at a time."""
    counts = torch.zeros(logits.shape[-1])
    for row in logits[valid]:
        for expert in row.topk(top_k).indices:
            counts[expert] += 1
    return counts / counts.sum()


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_of_one_layer_is_transformers_own_over_top_k(top_k):
    """transformers does not divide by top_k: its balanced value is top_k, ours 1. Padding: 2 rows of 3 and 5 tokens."""
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    valid = mask.flatten().bool()
    ours = balance_loss(logits, valid, fractions(logits, valid, top_k)) / valid.sum()
    theirs = load_balancing_loss_func((logits,), num_experts=4, top_k=top_k, attention_mask=mask)
    torch.testing.assert_close(ours, theirs / top_k)


def test_balance_is_one_when_perfect_and_shows_a_collapse_that_pooled_layers_hide():
    even = 8.0 * torch.eye(4).repeat(4, 1)
    valid = torch.ones(16, dtype=torch.bool)
    assert balance_loss(even, valid, fractions(even, valid, 1)).item() / 16 == pytest.approx(1.0)
    layers = [8.0 * F.one_hot(torch.full((16,), e), 4).float() for e in range(4)]  # each layer uses one expert only
    for layer in layers:
        assert balance_loss(layer, valid, fractions(layer, valid, 1)).item() / 16 == pytest.approx(4.0, rel=0.01)
    assert load_balancing_loss_func(tuple(layers), num_experts=4, top_k=1).item() == pytest.approx(1.0)


def test_balance_summed_over_ranks_is_the_single_process_value():
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    shares = fractions(logits.detach(), valid, 2)
    whole = balance_loss(logits, valid, shares)
    split = balance_loss(logits[:3], valid[:3], shares) + balance_loss(logits[3:], valid[3:], shares)
    torch.testing.assert_close(gradient(logits, whole), gradient(logits, split))
    probabilities = logits[valid].softmax(-1).mean(0)
    torch.testing.assert_close(whole / valid.sum(), 4 * (shares * probabilities).sum())
    assert torch.all(gradient(logits, balance_loss(logits, valid, shares))[~valid] == 0)


def test_descending_the_balance_loss_mends_a_collapse():
    router = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    tokens = torch.randn(64, 8, generator=torch.Generator().manual_seed(4)) + 1.0
    router[:, 0] += 1.0  # every token prefers expert 0
    router.requires_grad_()
    valid = torch.ones(64, dtype=torch.bool)
    before = fractions(tokens @ router.detach(), valid, 1).max()
    for _ in range(100):
        logits = tokens @ router
        loss = balance_loss(logits, valid, fractions(logits.detach(), valid, 1)) / 64
        router.data -= 0.5 * gradient(router, loss)
    assert before > 0.9
    assert fractions(tokens @ router.detach(), valid, 1).max() < 0.6


def test_router_z_loss_and_entropy_skip_padding():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [50.0, -50.0]], requires_grad=True)
    valid = torch.tensor([True, True, False])
    z = router_z_loss(logits, valid)
    assert z.item() == pytest.approx(math.log(2) ** 2 + math.log(4) ** 2)
    assert torch.all(gradient(logits, z)[2] == 0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert router_entropy(logits, valid).item() == pytest.approx(math.log(2) + entropy)


@pytest.mark.parametrize("loss", [router_z_loss, lambda x, valid: balance_loss(x, valid, torch.zeros(4))])
def test_router_losses_of_pure_padding_backpropagate_zeros(loss):
    logits = torch.randn(5, 4).requires_grad_()
    value = loss(logits, torch.zeros(5, dtype=torch.bool))
    assert value == 0
    assert torch.all(gradient(logits, value) == 0)


def test_hardness_counts_until_the_teacher_is_clearly_wrong():
    """A teacher worse by 2 s nats or less changes nothing, one worse by 12 takes all away."""
    worse = torch.tensor([-20.0, 0.0, 1.9, 4.0, 12.0])
    gate = learnability_gate(torch.zeros(5), worse * 0.5, scale=0.5)
    counted = chased_nats(torch.full((5,), 0.8), gate)
    assert counted[:3].tolist() == pytest.approx([0.8] * 3)
    assert counted[3:].tolist() == pytest.approx([1.6 / (1 + math.exp(2)), 0.0], abs=1e-4)


def test_hardness_is_the_kl_in_nats_up_to_a_bound():
    """Against torch's own on full distributions; a negative estimate is no hardness."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(40, 30, generator=generator) * 6 for _ in range(2))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert float(kl.min()) < 6 < float(kl.max())
    torch.testing.assert_close(chased_nats(kl, None), kl.clamp(max=6))
    assert chased_nats(torch.tensor([-0.3, 0.3, 70.0]), None).tolist() == pytest.approx([0.0, 0.3, 6.0])
