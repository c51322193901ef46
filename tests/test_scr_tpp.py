"""SCR and TPP: the published toy values, ablated means against ablated tokens, planted and shuffled concepts."""
import pytest
import torch
import torch.nn.functional as F

from lorasae.evals import saebench, scr, tpp
from lorasae.evals.probes import accuracy
from lorasae.evals.saebench import Means, one_against_rest
from lorasae.evals.scr_tpp import ablate, concept_probes, naive_ablate, strongest
from lorasae.evals.labelled import Cut
from lorasae.sae import JumpReLU, TopK


def dictionary(rows, kind=JumpReLU):
    """An SAE whose latents are these directions [M, D], each read and written along its own row."""
    sae = JumpReLU(rows.shape[1], len(rows)) if kind is JumpReLU else TopK(rows.shape[1], len(rows), 2)
    sae.W_enc.data, sae.W_dec.data = rows.clone(), rows.clone()
    return sae.requires_grad_(False)


def as_means(sae, x):
    """Texts of one token."""
    return Means(x, sae.encode(x), torch.ones(len(x)))


# ---- The formulas --------------------------------------------------------------------------------

def test_scr_reports_the_direction_in_which_the_biased_probe_is_worse_and_tpp_a_difference():
    dir1, dir2, reported = scr.shift(clean=(0.90, 0.95), biased=(0.70, 0.80), ablated=(0.78, 0.88))
    assert (dir1, dir2) == (pytest.approx(0.53333, abs=1e-5), pytest.approx(0.4))
    assert reported == dir2
    other = scr.shift(clean=(0.9, 0.95), biased=(0.8, 0.7), ablated=(0.9, 0.8))
    assert other[2] == pytest.approx(0.4)
    # A biased probe that is not worse leaves nothing to cure
    assert scr.shift(clean=(0.9, 0.8), biased=(0.9, 0.8), ablated=(0.7, 0.9)) == (0, 0, 0)

    # TPP is the intended drop less the unintended one
    clean = torch.tensor([0.9, 0.8, 0.95])
    ablated = torch.tensor([[0.6, 0.79, 0.95], [0.9, 0.7, 0.93], [0.88, 0.8, 0.65]])
    total, intended, unintended = tpp.perturbation(clean, ablated)
    assert (total, intended, unintended) == pytest.approx((0.225, 0.233333, 0.008333), abs=1e-6)


# ---- Ablation ------------------------------------------------------------------------------------

@pytest.fixture
def texts():
    """x [5, 12, 16] of texts of different lengths, and which of their positions count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, 16, generator=generator)
    counted = torch.arange(12) < torch.tensor([3, 12, 7, 1, 9])[:, None]
    return x, counted


def random_sae(kind=TopK):
    sae = dictionary(F.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(1)), dim=1), kind)
    sae.b_enc.data = 0.3 * torch.ones(24)
    sae.b_dec.data = 0.1 * torch.arange(16)
    return sae


def means_of(sae, x, counted):
    weights = counted[..., None] / counted.sum(1)[:, None, None]
    return Means((x * weights).sum(1), (sae.encode(x) * weights).sum(1), counted.sum(1))


@pytest.mark.parametrize("kind", [TopK, JumpReLU])
def test_ablating_the_means_is_ablating_every_token(texts, kind):
    sae, (x, counted) = random_sae(kind), texts
    chosen = torch.tensor([0, 3, 11])
    found = ablate(sae, means_of(sae, x, counted), chosen)
    torch.testing.assert_close(found, naive_ablate(sae, x, counted, chosen), atol=1e-5, rtol=1e-5)


def test_the_published_ablation_counts_padding(texts):
    sae, (x, counted) = random_sae(), texts
    padded = torch.zeros(5, saebench.LENGTH, 16)
    padded[:, :12] = x * counted[..., None]                                 # SAEBench's input: zero where masked
    chosen = sae.encode(torch.zeros(16)).nonzero().flatten()
    assert len(chosen)

    z = sae.encode(padded)
    published = (padded.sum(1) - (z[..., chosen] @ sae.W_dec[chosen]).sum(1)) / counted.sum(1, keepdim=True)
    means = means_of(sae, x, counted)
    torch.testing.assert_close(ablate(sae, means, chosen, count_padding=True), published, atol=1e-5, rtol=1e-4)
    nothing = torch.tensor([], dtype=torch.long)
    for count_padding in (False, True):
        assert torch.equal(ablate(sae, means, nothing, count_padding), means.residual)
    moved = (published - ablate(sae, means, chosen)).norm(dim=1)
    assert moved.argmax() == counted.sum(1).argmin()                        # the shortest text most


def test_as_many_latents_are_ablated_as_have_an_effect():
    effects = torch.tensor([0.0, 0.3, 0.0, 0.1, 0.2])
    assert strongest(effects, 2).tolist() == [1, 4]
    assert sorted(strongest(effects, 50).tolist()) == [1, 3, 4]


# ---- Planted concepts ----------------------------------------------------------------------------

CLASSES, EACH, D = 10, 90, 32


def class_texts(seed):
    """x [CLASSES · EACH, D]: class i lies along axis i; one axis is constant, the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(CLASSES * EACH, D, generator=generator)
    x[torch.arange(len(x)), torch.arange(CLASSES).repeat_interleave(EACH)] += 4
    x[:, -1] += 4
    cut = {str(i): ["text"] * EACH for i in range(CLASSES)}
    return x, cut


def tpp_of(sae):
    (train, cut), (test, _) = class_texts(0), class_texts(1)
    return tpp.measure(sae, as_means(sae, train), as_means(sae, test), Cut(cut, cut), seed=42)


def test_tpp_is_nearly_its_maximum_where_a_latent_is_a_class_and_zero_for_a_shuffled_dictionary():
    sae = dictionary(torch.eye(D))
    found = tpp_of(sae)
    assert found["clean"] > 0.98
    assert found["top_2"] > 0.4                         # at most clean - 0.5
    assert abs(found["unintended_2"]) < 0.05
    sae.W_dec.data = sae.W_dec.data.roll(CLASSES, 0)    # fires on a class, writes into the noise
    assert abs(tpp_of(sae)["top_2"]) < 0.03


def quadrant_texts(seed, n):
    """Class along axis 0, attribute twice as strong along axis 1; {quadrant: texts} with n of each."""
    generator = torch.Generator().manual_seed(seed)
    parts, cut = [], {}
    for label, sign in (("professor", 1), ("nurse", -1)):
        for attribute, other in (("male", 1), ("female", -1)):
            x = 0.5 * torch.randn(n, D, generator=generator)
            x[:, 0] += 1.5 * sign
            x[:, 1] += 3 * other
            parts.append(x)
            cut[label, attribute] = ["text"] * n
    return torch.cat(parts), cut


def scr_of(sae):
    (train, train_cut), (test, test_cut) = quadrant_texts(0, 400), quadrant_texts(1, 100)
    return scr.measure(sae, as_means(sae, train), as_means(sae, test), Cut(train_cut, test_cut), seed=42)


def test_scr_is_nearly_one_where_latents_are_the_concepts_and_zero_for_a_shuffled_dictionary():
    axes = torch.eye(D)[:2]
    sae = dictionary(torch.cat([axes, -axes]))
    found = scr_of(sae)
    assert found["biased"] < found["clean"] - 0.2
    assert found["top_2"] > 0.9
    assert found["top_2"] == found["dir1_2"]            # it is worse at the class
    sae.W_dec.data = torch.eye(D)[2:6]                  # fires on a concept, writes into the noise
    assert abs(scr_of(sae)["top_2"]) < 0.05


def test_the_three_probes_see_the_texts_that_saebench_gives_them():
    cut = {("p", "m"): range(6), ("p", "f"): range(4), ("n", "m"): range(3), ("n", "f"): range(9)}
    train = scr.training_tasks(cut)
    pm, pf, nm, nf = [0, 1, 2], [6, 7, 8], [10, 11, 12], [13, 14, 15]
    assert train.rows.tolist() == [pm + nm + pf + nf, pm + pf + nm + nf, [0, 1, 2, 3, 4, 5, 13, 14, 15, 16, 17, 18]]
    assert train.labels.tolist() == [[1] * 6 + [0] * 6] * 3
    test = scr.test_tasks(cut)
    assert test.rows.shape == (2, 12)
    assert set(test.rows[0].tolist()) == set(test.rows[1].tolist())


def test_a_probe_of_one_task_does_not_feel_the_others():
    (x, _), task = class_texts(0), one_against_rest([EACH] * CLASSES, 42)
    alone = concept_probes(x, task, seed=1)
    others = task._replace(labels=torch.cat([task.labels[:1], 1 - task.labels[1:]]))
    beside = concept_probes(x, others, seed=1)
    assert torch.equal(alone.weight[0], beside.weight[0])
    assert not torch.equal(alone.weight[1], beside.weight[1])
    assert accuracy(alone, x, task).min() > 0.98
