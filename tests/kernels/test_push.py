"""Pushes between simulated ranks: regions of one process, each rank's kernels run in turn."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moesaic.kernels.peers import STRIDE, UNITS, Region, Tile, Window, plan_push
from moesaic.kernels.push import (
    push_rows,
    push_rows_ref,
    push_tokens,
    push_tokens_ref,
    wait_for,
)

SMALL = Tile(blocks=3, own=2, chunk=4, rows=4, slice=32, block=32, warps=4)
SPARSE = Tile(blocks=2, own=1, chunk=8, rows=2, slice=64, block=32, warps=4)


class Ranks:
    """G regions on one device, filled with a word that no test writes."""

    def __init__(self, ranks, bound, top_k, local, words, device):
        self.local, self.bound, self.top_k, self.words = local, bound, top_k, words
        self.width = min(top_k, local)
        sizes = {"ranks": ranks, "bound": bound, "top_k": top_k, "width": self.width}
        self.region = Region.of(**sizes, in_words=words, back_words=words)
        size = self.region.num_bytes // 4
        self.memory = [torch.full((size,), -7, dtype=torch.int32, device=device) for _ in sizes]
        self.memory = [self.memory[0].clone() for _ in range(ranks)]
        base_G = torch.tensor([m.data_ptr() for m in self.memory], device=device)
        flags = STRIDE.value * (2 * ranks + 1)
        for memory in self.memory:
            memory[:flags] = 0
        self.windows = [
            Window(
                base_G, torch.zeros(2, ranks, dtype=torch.int32, device=device), self.region,
                rank, top_k, self.width, local, 1000,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def part(self, rank, at, *shape):
        count = int(torch.Size(shape).numel())
        return self.memory[rank][at // 4 : at // 4 + count].view(shape)


def draw(ranks, tokens, top_k, experts, words, device):
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.randint(0, 9999, (t, words), generator=generator, dtype=torch.int32) for t in tokens
    ]
    ids = [
        torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(t)])
        if t
        else torch.zeros(0, top_k, dtype=torch.int64)
        for t in tokens
    ]
    return [r.to(device) for r in rows], [i.to(torch.int32).to(device) for i in ids]


CASES = {
    "one expert a rank": (4, (5, 0, 7, 8), 2, 4, 1, SMALL),
    "as many as choices": (2, (9, 4), 2, 4, 2, SPARSE),
    "fewer than choices": (3, (6, 6, 1), 4, 6, 2, SPARSE),
    "uneven slices": (2, (5, 9), 2, 4, 2, Tile(3, 2, 4, 4, 48, 16, 4)),
    "alone": (1, (6,), 2, 4, 4, SMALL),
    "gathered": (2, (90, 70), 2, 4, 2, Tile(3, 1, 64, 32, 64, 64, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_go_there_and_back(name, kernel_device) -> None:
    count, tokens, top_k, experts, local, tile = CASES[name]
    words, bound = 64, max(tokens)
    ranks = Ranks(count, bound, top_k, local, words, kernel_device)
    rows, ids = draw(count, tokens, top_k, experts, words, kernel_device)
    if tokens[0]:
        ids[0][0, 0] = -1  # of nobody
    place_E = torch.arange(experts, dtype=torch.int32, device=kernel_device)
    place_GE = place_E.cpu().expand(count, -1)
    kept = [torch.empty(bound, top_k, dtype=torch.int32, device=kernel_device) for _ in tokens]
    for turn in range(2):
        for window, mine, wanted, position in zip(ranks.windows, rows, ids, kept, strict=True):
            push_tokens(
                window, mine, wanted, place_E, position, bound=bound, tile=tile, wait_too=False
            )
            slots = torch.arange(wanted.numel()).view(wanted.shape)
            want = torch.where(wanted.cpu() >= 0, slots, -1)
            assert torch.equal(position[: len(wanted)].cpu(), want.int())
        for window in ranks.windows:
            wait_for(window, 0)
            arrived = [(turn + 1) * UNITS.value] * count
            assert window.seen_2G.tolist() == [arrived, [turn * UNITS.value] * count]
        sent, positions, choices = [], [], []
        shape = (count, bound, ranks.width)
        for rank in range(count):
            want_ids, want_choice = push_tokens_ref(
                [i.cpu() for i in ids], place_GE, rank, bound=bound, local=local, width=ranks.width
            )
            got_ids = ranks.part(rank, ranks.region.ids_at, *shape).cpu().clone()
            for source, t in enumerate(tokens):
                assert (got_ids[source, t:] == -1).all()
            assert torch.equal(got_ids, want_ids)
            live = got_ids >= 0
            if ranks.width < top_k:
                got_choice = ranks.part(rank, ranks.region.choice_at, *shape).cpu()
                assert torch.equal(got_choice[live], want_choice[live])
            got = ranks.part(rank, ranks.region.rows_at, count, bound, words).cpu()
            for source, token in live.any(-1).nonzero().tolist():
                assert torch.equal(got[source, token], rows[source][token].cpu())
            for source, token in (~live.any(-1)).nonzero().tolist():
                assert (got[source, token] == -7).all(), "a row that nobody needs was sent"
            position = torch.where(live, live.flatten().cumsum(0).view(shape) - 1, -1)
            positions.append(position.to(torch.int32))
            choices.append(want_choice)
            generator = torch.Generator().manual_seed(rank + 10 * turn)
            sent.append(
                torch.randint(0, 9999, (int(live.sum()) + 1, words), generator=generator).int()
            )
        for rank, window in enumerate(ranks.windows):
            push_rows(
                window,
                sent[rank].to(kernel_device),
                positions[rank].flatten().to(kernel_device),
                bound=bound,
                tile=tile,
                wait_too=False,
            )
        for rank, window in enumerate(ranks.windows):
            wait_for(window, 1)
            back = ranks.part(rank, ranks.region.back_at, bound, top_k, words).cpu()
            want = push_rows_ref(sent, positions, choices, rank, top_k=top_k)
            live = ids[rank].cpu() >= 0
            assert torch.equal(back[: tokens[rank]][live], want[: tokens[rank]][live])
            assert (back[: tokens[rank]][~live] == -7).all()
    assert all(int(ranks.part(r, ranks.windows[0].flags_at(2), 1)) == 0 for r in range(count))


def test_flags_wrap_around(kernel_device) -> None:
    ranks = Ranks(2, 2, 1, 1, 64, kernel_device)
    rows, ids = draw(2, (2, 2), 1, 2, 64, kernel_device)
    place_E = torch.arange(2, dtype=torch.int32, device=kernel_device)
    high = 2**31 - UNITS.value // 2
    for rank, window in enumerate(ranks.windows):
        window.seen_2G.fill_(high - 2**32 if high >= 2**31 else high)
        for peer in range(2):
            ranks.memory[rank][peer * STRIDE.value] = high
    for window, mine, wanted in zip(ranks.windows, rows, ids, strict=True):
        position = torch.empty_like(wanted)
        push_tokens(window, mine, wanted, place_E, position, bound=2, tile=SMALL, wait_too=False)
    for window in ranks.windows:
        wait_for(window, 0)
        assert (window.seen_2G[0] < 0).all()
        assert int(ranks.part(window.rank, window.flags_at(2), 1)) == 0


def test_a_lost_peer_shows_here_and_at_the_others(kernel_device) -> None:
    ranks = Ranks(3, 2, 1, 1, 64, kernel_device)
    rows, ids = draw(3, (2, 2, 2), 1, 3, 64, kernel_device)
    place_E = torch.arange(3, dtype=torch.int32, device=kernel_device)
    alive = ranks.windows[:2]
    for window in alive:
        position = torch.empty_like(ids[0])
        push_tokens(window, rows[0], ids[0], place_E, position, bound=2, tile=SMALL, wait_too=False)
    status_at = ranks.windows[0].flags_at(2)
    wait_for(ranks.windows[0], 0)
    assert int(ranks.part(0, status_at, 1)) == 3
    assert int(ranks.part(1, status_at, 1)) == 0
    nothing = torch.full((3 * 2,), -1, dtype=torch.int32, device=kernel_device)
    push_rows(ranks.windows[0], rows[0], nothing, bound=2, tile=SMALL, wait_too=False)
    assert int(ranks.part(1, status_at, 1)) == 3, "told by the signal of rank 0"
    wait_for(ranks.windows[1], 1, spoiled=2 * 64)
    back = ranks.part(1, ranks.region.back_at, 2, 1, 64)
    assert back.view(torch.float32).isnan().all()
    assert back.view(torch.bfloat16).isnan().all() and back.view(torch.float16).isnan().all()


@pytest.mark.parametrize("programs", [8, 32, 132])
@pytest.mark.parametrize("rows", [1, 3, 32, 128, 1000, 2000, 4096, 65536])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_plans_keep_the_budget(rows, ranks, programs) -> None:
    tile = plan_push(rows, 3584, ranks, programs)
    assert (ranks - 1) * tile.blocks + tile.own <= max(programs, ranks)
    assert tile.chunk % tile.rows == 0 and tile.slice % tile.block == 0
    assert 1 <= tile.warps <= 16 and tile.blocks <= UNITS.value
