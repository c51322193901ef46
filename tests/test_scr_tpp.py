"""SCR and TPP: published toy values, ablated means and tokens, planted and shuffled concepts."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lorasae.evals import saebench, scr, tpp
from lorasae.evals.concepts import THRESHOLDS, ablate, strongest
from lorasae.evals.texts import LENGTH, Cut, Means
from lorasae.sae import JumpReLU, TopK

ATTRIBUTE, CLASS = scr.ATTRIBUTE, scr.CLASS


def dictionary(rows, kind=JumpReLU):
    """An SAE whose latents are these directions [M, D], each read and written along its own row."""
    sae = kind(rows.shape[1], len(rows), 2)
    sae.W_enc.data, sae.W_dec.data = rows.clone(), rows.clone()
    return sae.requires_grad_(False)


def as_means(sae, x):
    """Texts of one token."""
    return Means(x, sae.encode(x))


def test_scr_and_tpp_of_saebenchs_toy_values():
    assert scr.cured(clean=0.95, biased=0.80, ablated=0.88) == pytest.approx(0.53333, abs=1e-5)
    # A biased probe that is not worse leaves nothing to cure
    assert scr.cured(clean=0.9, biased=0.9, ablated=0.7) == 0

    clean = torch.tensor([0.9, 0.8, 0.95])
    ablated = torch.tensor([[0.6, 0.79, 0.95], [0.9, 0.7, 0.93], [0.88, 0.8, 0.65]])
    assert tpp.perturbation(clean, ablated) == pytest.approx(0.225, abs=1e-6)


def test_scores_are_each_models_own_but_differ_on_the_base_models_concept(monkeypatch):
    def scores(biased, top):
        return {"clean": 0.9, "biased": biased, **{f"top_{n}": top for n in THRESHOLDS}}

    base = {ATTRIBUTE: scores(0.7, 0.1), CLASS: scores(0.6, 0.2)}       # reports the class
    lora = {ATTRIBUTE: scores(0.5, 0.7), CLASS: scores(0.6, 0.3)}       # reports the attribute
    found = {"pair": {"base": [base], "lora": [lora]}}
    monkeypatch.setattr(saebench, "compare", lambda *_: found)
    numbers = scr.evaluate(SimpleNamespace(saes={12: None}), "stdlib", 1)
    for metric in ("top_2", "max", "average"):
        row = numbers["rows"][metric]
        assert (row["base"], row["lora"]) == pytest.approx((0.2, 0.7))
        assert row["difference"] == pytest.approx(0.3 - 0.2)
    assert set(numbers["rows"]) == set(saebench.table_6("scr")[0])
    assert any("S of one concept" in note for note in scr.tables(numbers)[0].notes)


def naive_ablate(sae, x, counted, latents):
    """Token by token, as SAEBench writes it: x [N, T, D], counted [N, T] bool -> [N, D]."""
    z = sae.encode(x)
    error = x - sae.decode(z)
    z[..., latents] = 0
    ablated = sae.decode(z) + error
    return (ablated * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [TopK, JumpReLU])
def test_ablating_the_means_is_ablating_every_token_and_padding_would_move_short_texts(kind):
    generator = torch.Generator().manual_seed(1)
    sae = dictionary(F.normalize(torch.randn(24, 16, generator=generator), dim=1), kind)
    sae.b_enc.data, sae.b_dec.data = 0.3 * torch.ones(24), 0.1 * torch.arange(16)
    x = torch.randn(5, LENGTH, 16, generator=generator)
    counted = torch.arange(LENGTH) < torch.tensor([3, 12, 7, 1, 9])[:, None]
    weights = counted[..., None] / counted.sum(1)[:, None, None]
    means = Means((x * weights).sum(1), (sae.encode(x) * weights).sum(1))
    at_zero = sae.encode(torch.zeros(16)).nonzero().flatten()[:2]
    chosen = torch.cat([at_zero, torch.tensor([3, 11])]).unique()

    found = ablate(sae, means, chosen)
    torch.testing.assert_close(found, naive_ablate(sae, x, counted, chosen), atol=1e-5, rtol=1e-5)
    assert torch.equal(ablate(sae, means, chosen[:0]), means.residual)

    # SAEBench's input is zero where masked, and it sums over all positions
    z = sae.encode(x * counted[..., None])
    written = (z[..., chosen] @ sae.W_dec[chosen]).sum(1)
    published = means.residual - written / counted.sum(1, keepdim=True)
    assert (published - found).norm(dim=1).argmax() == counted.sum(1).argmin()


def test_as_many_latents_are_ablated_as_have_an_effect():
    effects = torch.tensor([0.0, 0.3, 0.0, 0.1, 0.2])
    assert strongest(effects, 2).tolist() == [1, 4]
    assert sorted(strongest(effects, 50).tolist()) == [1, 3, 4]


CLASSES, EACH, D = 10, 90, 32


def class_texts(seed):
    """x [CLASSES · EACH, D]: class i lies along axis i; one axis is constant, others are noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(CLASSES * EACH, D, generator=generator)
    x[torch.arange(len(x)), torch.arange(CLASSES).repeat_interleave(EACH)] += 4
    x[:, -1] += 4
    return x, {str(i): ["text"] * EACH for i in range(CLASSES)}


def tpp_of(sae):
    (train, cut), (test, _) = class_texts(0), class_texts(1)
    return tpp.measure(sae, as_means(sae, train), as_means(sae, test), Cut(cut, cut), seed=42)


def test_tpp_is_nearly_its_maximum_if_a_latent_is_a_class_and_zero_for_a_shuffled_dictionary():
    sae = dictionary(torch.eye(D))
    found = tpp_of(sae)
    assert found["clean"] > 0.98
    assert found["top_2"] > 0.4                         # at most clean - 0.5
    sae.W_dec.data = sae.W_dec.data.roll(CLASSES, 0)    # fires on a class, writes into the noise
    assert abs(tpp_of(sae)["top_2"]) < 0.03


def quadrant_texts(seed, n):
    """Class along axis 0, attribute twice as strong along axis 1; n texts per quadrant."""
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
    cut = Cut(train_cut, test_cut)
    return scr.measure(sae, as_means(sae, train), as_means(sae, test), cut, seed=42)


def test_scr_is_nearly_one_if_latents_are_the_concepts_and_zero_for_a_shuffled_dictionary():
    axes = torch.eye(D)[:2]
    sae = dictionary(torch.cat([axes, -axes]))
    found = scr_of(sae)
    assert scr.worse_known(found) == CLASS
    assert found[CLASS]["biased"] < found[CLASS]["clean"] - 0.2
    assert found[CLASS]["top_2"] > 0.9
    sae.W_dec.data = torch.eye(D)[2:6]                  # fires on a concept, writes into the noise
    assert abs(scr_of(sae)[CLASS]["top_2"]) < 0.05


def test_the_three_probes_see_the_texts_that_saebench_gives_them():
    cut = {("p", "m"): range(6), ("p", "f"): range(4), ("n", "m"): range(3), ("n", "f"): range(9)}
    train = scr.training_tasks(cut)
    pm, pf, nm, nf = [0, 1, 2], [6, 7, 8], [10, 11, 12], [13, 14, 15]
    biased = [0, 1, 2, 3, 4, 5, 13, 14, 15, 16, 17, 18]
    assert train.rows.tolist() == [pm + nm + pf + nf, pm + pf + nm + nf, biased]
    assert train.labels.tolist() == [[True] * 6 + [False] * 6] * 3
    test = scr.test_tasks(cut)
    assert test.rows.tolist() == train.rows[:2].tolist()
