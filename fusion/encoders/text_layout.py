"""How several texts lie in one pass: padded to the longest, or packed into one row.

Packed, every token is real: texts follow each other, positions begin again with each, and
attention runs within each text (the diagonal blocks of a mask that is never made).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

PACKED_ATTENTION: Final = "packed_texts"


def padded(model: nn.Module, texts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Last hidden states of texts as rows, padded on the right.

    Returns:
        [N, L, D] states, and [N, L] bool, True = a token of the text.
    """
    device = _device(model)
    longest = max(map(len, texts))
    rows = [[*text, *[pad_id] * (longest - len(text))] for text in texts]
    lengths = torch.tensor([len(text) for text in texts], device=device)
    valid = torch.arange(longest, device=device) < lengths[:, None]
    ids = torch.tensor(rows, device=device)
    states = model(input_ids=ids, attention_mask=valid.long())
    return states.last_hidden_state, valid


def packed(model: nn.Module, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Last hidden states of texts in one row.

    Returns:
        [1, T, D] states of all texts in order, and the N + 1 borders between them.
    """
    device = _device(model)
    borders = [0, *accumulate(map(len, texts))]
    numbers = [number for text in texts for number in text]
    places = [place for text in texts for place in range(len(text))]
    states = model(
        input_ids=torch.tensor([numbers], device=device),
        position_ids=torch.tensor([places], device=device),
        text_borders=tuple(borders),
    )
    return states.last_hidden_state, borders


def group_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Texts of similar length in groups whose rows, padded to the longest, hold `budget` tokens.

    A text longer than the budget is a group of its own.

    Returns:
        Places in `lengths`, each in one group, rising within a group.
    """
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not groups or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[place]
        groups[-1].append(place)
    return [sorted(group) for group in groups]


def group_packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Texts in groups of up to `budget` tokens, the longest first, each where it first fits.

    Returns:
        As `group_padded`.
    """
    groups: list[list[int]] = []
    sums: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fits = (number for number, held in enumerate(sums) if held + lengths[place] <= budget)
        number = next(fits, len(groups))
        if number == len(groups):
            groups.append([])
            sums.append(0)
        groups[number].append(place)
        sums[number] += lengths[place]
    return [sorted(group) for group in groups]


def register_packed_attention() -> None:
    """Make the packed attention known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, _attend_within_texts)
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *_, **__: None)


def _attend_within_texts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    text_borders: tuple[int, ...],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of [1, H, T, E] heads, text by text."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None
    parts = []
    for start, end in pairwise(text_borders):
        window = _window(end - start, sliding_window, query.device)
        heads = (states[:, :, start:end] for states in (query, key, value))
        parts.append(sdpa_attention_forward(module, *heads, window, **options)[0])
    return torch.cat(parts, 1), None


def _window(length: int, reach: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, L, L] bool of a causal attention that reaches back `reach` tokens; None if all."""
    if reach is None or length <= reach:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return ((back >= 0) & (back < reach))[None, None]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
