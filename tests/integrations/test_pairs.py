"""Which samples come in which batch."""

import pytest

from projgrad.integrations.pairs import PairedBatches, Pairs

pytestmark = pytest.mark.same_without_extension


def batches(forgets=10, retains=24, sizes=(3, 5), epoch=0, **options):
    pairs = Pairs(range(forgets), range(100, 100 + retains))
    drawn = PairedBatches(pairs, *sizes, seed=options.pop("seed", 7), epoch=lambda: epoch, **options)
    found = list(drawn)
    assert len(found) == len(drawn)
    return [[x for x in batch if x < forgets] for batch in found], [
        [x - forgets for x in batch if x >= forgets] for batch in found
    ]


def together(parts):
    return [x for part in parts for x in part]


def test_an_epoch_passes_over_the_forget_set_once():
    forget, retain = batches()
    assert sorted(together(forget)) == list(range(10)) and [len(b) for b in forget] == [3, 3, 3, 1]
    assert all(len(set(b)) == 5 for b in retain) and len(set(together(retain))) == 20


def test_the_order_depends_on_seed_and_epoch_alone():
    assert batches() == batches() != batches(epoch=1) != batches(seed=8) != batches()
    assert batches(epoch=1) != batches(seed=8)


def test_no_retain_sample_comes_twice_in_a_batch():
    _, retain = batches(forgets=40, retains=7)
    assert all(len(set(b)) == 5 for b in retain) and set(together(retain)) == set(range(7))


def test_in_sequence():
    forget, retain = batches(shuffle=False)
    assert forget[0] == [0, 1, 2] and retain[1] == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("forgets", [1, 2, 10, 12])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(forgets, world):
    """Equal numbers of forget samples everywhere; the last batch is filled up from the first."""
    whole = batches(forgets, sizes=(3 * world, 5 * world))
    parts = [batches(forgets, rank=rank, world=world) for rank in range(world)]
    for side in (0, 1):
        for k, batch in enumerate(whole[side]):
            own = [part[side][k] for part in parts]
            assert len({len(x) for x in own}) == 1
            assert set(together(own)) >= set(batch) and (len(together(own)) - len(batch) < world)


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="8 retain samples are asked for in a micro-batch, but retain_dataset has 7"):
        batches(retains=7, sizes=(3, 8))
    with pytest.raises(ValueError, match="no batch of 11 forget samples is full"):
        batches(sizes=(11, 1), drop_last=True)
    assert [len(b) for b in batches(drop_last=True)[0]] == [3, 3, 3]
    with pytest.raises(ValueError, match="forget_dataset is empty"):
        Pairs([], [1])
    with pytest.raises(TypeError, match="retain_dataset must have a length and items by number; got generator"):
        Pairs([1], (x for x in [1]))
