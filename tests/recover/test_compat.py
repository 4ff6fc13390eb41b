"""The `compat` objective against its formula, written out in NumPy on small vectors."""

import numpy as np
import pytest
import torch

from edgekit.errors import DataError
from edgekit.models.bt2 import Bt2Head
from edgekit.recover.compat import CompatWeights, class_means, cluster_classes, compat_loss, cosine_distance


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    shapes = {"new": (5, 6), "teacher": (5, 6), "compatible": (5, 4), "stored": (5, 4), "means": (3, 4), "logits": (5, 3)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"labels": np.array([0, 2, 1, 1, 0])}


def distance(a, b):
    return np.mean([1 - x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)])


def cross_entropy(logits, labels):
    return np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)])


def tensors(vectors, *names):
    return {name: torch.from_numpy(vectors[name]) for name in names}


def test_loss_is_the_weighted_sum_of_its_terms(vectors):
    v = vectors
    lengths = np.sqrt((v["compatible"] ** 2).sum(1, keepdims=True))
    own, pseudo = cross_entropy(v["logits"], v["labels"]), cross_entropy(v["compatible"] / lengths @ v["means"].T, v["labels"])
    new, old = distance(v["new"], v["teacher"]), distance(v["compatible"], v["stored"])
    assert compat_loss(**tensors(v, *v)).item() == pytest.approx(own + 10 * pseudo + 5 * old + 1 * new, rel=1e-12)
    weights = CompatWeights(teacher=0.3, classes=0.7, stored=0.2)
    assert compat_loss(**tensors(v, *v), weights=weights).item() == pytest.approx(own + 0.7 * pseudo + 0.2 * old + 0.3 * new, rel=1e-12)
    plain = tensors(v, "new", "compatible", "teacher", "stored")
    assert compat_loss(**plain).item() == pytest.approx(5 * old + new, rel=1e-12)


def test_loss_does_not_depend_on_lengths_and_is_zero_at_its_aim(vectors):
    v = tensors(vectors, "new", "compatible", "teacher", "stored")
    scaled = v | {"new": 3 * v["new"], "compatible": 0.1 * v["compatible"]}
    assert compat_loss(**scaled).item() == pytest.approx(compat_loss(**v).item(), rel=1e-12)
    assert compat_loss(v["teacher"], v["stored"], teacher=v["teacher"], stored=v["stored"]).item() == pytest.approx(0, abs=1e-12)
    assert cosine_distance(v["new"], -v["new"]).item() == pytest.approx(2, rel=1e-12)


def test_class_means(vectors):
    stored, labels = vectors["compatible"], vectors["labels"]
    found = class_means(torch.from_numpy(stored), torch.from_numpy(labels), 3).numpy()
    np.testing.assert_allclose(found, [stored[[0, 4]].mean(0), stored[[2, 3]].mean(0), stored[1]], rtol=1e-12)
    with pytest.raises(DataError, match="class 3 has no sample"):
        class_means(torch.from_numpy(stored), torch.from_numpy(labels), 4)
    with pytest.raises(DataError, match="from 0 to 1"):
        class_means(torch.from_numpy(stored), torch.from_numpy(labels), 2)


def test_clusters_are_classes_with_their_means():
    rng = np.random.default_rng(1)
    centres = 10 * np.eye(4)
    truth = rng.integers(0, 4, 40)
    stored = torch.from_numpy(centres[truth] + rng.normal(0, 0.1, (40, 4)))
    found = cluster_classes(stored, 4)
    same = found.labels[:, None] == found.labels
    assert torch.equal(same, torch.from_numpy(truth[:, None] == truth))
    torch.testing.assert_close(found.means, class_means(stored, found.labels, 4))
    assert torch.equal(cluster_classes(stored, 4).labels, found.labels)  # seeded
    with pytest.raises(DataError, match="3 vectors cannot be put into 4 classes"):
        cluster_classes(stored[:3], 4)


def test_bad_arguments_are_named(vectors):
    v = tensors(vectors, "new", "compatible", "teacher", "stored")
    with pytest.raises(DataError, match="compared with"):
        compat_loss(**(v | {"teacher": v["stored"]}))
    with pytest.raises(DataError, match="needs the class"):
        compat_loss(**v, means=torch.ones(3, 4))


def test_head_learns_to_be_searchable_among_stored_vectors():
    """Gaussian classes: the trained head finds stored vectors of the same class far better than the untrained one."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(30, 24), dim=1)
    labels = torch.arange(30).repeat(5)
    x = centres[labels] + 0.08 * torch.randn(150, 24)
    stored, teacher = x @ torch.randn(24, 12), torch.nn.functional.normalize(x @ torch.randn(24, 16), dim=1)
    net = torch.nn.Linear(24, 28)
    head = Bt2Head(new=16, old=12, extra=4)

    def recall():
        with torch.no_grad():
            queries = head(net(x))[:, :12]
        gallery = torch.nn.functional.normalize(stored, dim=1)
        scores = torch.nn.functional.normalize(queries, dim=1) @ gallery.T
        scores.fill_diagonal_(-9)
        return (labels[scores.argmax(1)] == labels).double().mean().item()

    before = recall()
    means = class_means(stored, labels, 30)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=2e-2)
    losses = []
    for _ in range(30):
        parts = head.parts(net(x))
        loss = compat_loss(parts.new, parts.compatible, teacher=teacher, stored=stored, means=means, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert before < 0.2
    assert recall() > 0.6
