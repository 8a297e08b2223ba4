"""What is said of a sample in a likeness; known values are beside the other measures, in alignment."""

import torch
from concept_shards import aligned

from d2v_scale.data2vec.likeness import debiased_cka


def test_jackknife_values_of_cka_are_those_without_each_sample() -> None:
    x, y = aligned(25, 5, 1.0, 4)
    values = debiased_cka(x, y)
    whole = values.mean()
    rest = [torch.arange(25) != row for row in range(25)]
    # The statistic does not depend on where the features' centre is.
    left_out = torch.stack([debiased_cka(x[one], y[one]).mean() for one in rest])
    pseudo = 25 * whole - 24 * left_out
    torch.testing.assert_close(values, pseudo - pseudo.mean() + whole, atol=1e-8, rtol=1e-6)
