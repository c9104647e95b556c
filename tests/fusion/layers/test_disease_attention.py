import math

import torch

from fusion.layers.disease_attention import ClasswiseHead, DiseaseAttention

D, C = 6, 4


def layer() -> DiseaseAttention:
    torch.manual_seed(0)
    return DiseaseAttention(width=D, classes=C)


def literal(module: DiseaseAttention, rows: torch.Tensor, available: list[bool]):
    """Eq 5-8 for one patient, with loops."""
    weight, bias = module.projection.weight, module.projection.bias
    blocks = [(weight[i * D : (i + 1) * D], bias[i * D : (i + 1) * D]) for i in range(2 + C)]
    at_hand = [i for i in range(3) if available[i]]
    mean = sum(rows[i] for i in at_hand) / len(at_hand)
    query = blocks[0][0] @ mean + blocks[0][1]
    attention, fused = torch.zeros(C, 3), torch.zeros(C, D)
    for c in range(C):
        key, offset = blocks[2 + c]
        scores = {i: query @ (key @ rows[i] + offset) / math.sqrt(D) for i in at_hand}
        total = sum(torch.exp(score) for score in scores.values())
        for i in at_hand:
            attention[c, i] = torch.exp(scores[i]) / total
            fused[c] += attention[c, i] * (blocks[1][0] @ rows[i] + blocks[1][1])
    return fused, attention


def test_equals_the_papers_equations_row_by_row():
    module = layer()
    rows = torch.randn(3, 3, D)
    masks = [[True, True, True], [True, True, False], [False, True, True]]
    fused, attention = module(rows, torch.tensor(masks))
    for row, mask in enumerate(masks):
        expected_fused, expected_attention = literal(module, rows[row], mask)
        torch.testing.assert_close(fused[row], expected_fused, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attention[row], expected_attention, atol=1e-5, rtol=1e-5)


def test_a_missing_representation_has_no_weight_and_no_say():
    module = layer()
    rows = torch.randn(1, 3, D)
    available = torch.tensor([[True, True, False]])
    fused, attention = module(rows, available)
    assert not attention[..., 2].any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, C))
    rows[0, 2] = 1e4
    again, _ = module(rows, available)
    torch.testing.assert_close(again, fused)


def test_size_at_the_papers_numbers():
    module = DiseaseAttention(width=256, classes=25)
    assert sum(p.numel() for p in module.parameters()) == 1_776_384


def test_each_class_has_its_own_head():
    head = ClasswiseHead(width=D, classes=C).requires_grad_(False)
    fused = torch.randn(2, C, D)
    before = head(fused)
    expected = [[head.weight[c] @ fused[b, c] + head.bias[c] for c in range(C)] for b in range(2)]
    torch.testing.assert_close(before, torch.tensor(expected))
    head.weight[1] += 1.0
    changed = (head(fused) != before).any(0)
    assert changed.tolist() == [False, True, False, False]
