from __future__ import annotations

import torch

from mmdefense.analysis.clusters import Clusters, clusters
from mmdefense.data.batch import few


def test_triggered_samples_lie_where_their_nearest_clean_ones_are():
    clean = torch.tensor([[0.0], [1.0]]).repeat_interleave(6, 0)  # classes 0 and 1
    before, after = (torch.cat([clean, torch.full((2, 1), place)]) for place in (0.0, 1.0))
    labels = torch.tensor([0] * 6 + [1] * 6 + [1] * 2)
    found = Clusters(before, after, labels, torch.arange(14) >= 12, target=0)
    assert found.among() == ((1.0, 0.0), (0.0, 1.0))


def test_both_models_are_read_on_clean_and_triggered_samples(victims, data, triggered):
    backdoored, benign, _ = victims
    found = clusters(backdoored, benign, data[1], triggered, 0, count=60, triggered_count=20)
    assert found.before.shape == (80, 128)
    assert int(found.triggered.sum()) == 20
    assert torch.equal(found.labels[found.triggered], few(triggered.clean, 20).labels)
    assert not torch.equal(found.before, found.after)
    assert len(found.plot().panels()) == 2
