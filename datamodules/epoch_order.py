"""The order of a training epoch's samples: drawn near each other on disk, and in batches of similar length if asked."""

import random
from collections.abc import Iterator, Sequence

from .contents import Contents


def epoch_order(contents: Contents, seed: int, epoch: int, shuffle_buffer: int) -> list[int]:
    """Sample numbers in the order of a training epoch.

    Shards come in random order, and each next sample is drawn among ``shuffle_buffer`` of them, so that samples that
    are read together lie close to each other on disk. The order is then rotated by a random amount, so that its end,
    which training leaves out, holds other samples in each epoch.

    Args:
        contents: Samples of the set.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.
        shuffle_buffer: Number of samples among which the next one is drawn; 0 keeps the order on disk.
    """
    if not shuffle_buffer:
        return list(range(len(contents)))
    rng = random.Random(f"{seed} {epoch}")
    of_shard: dict[int, list[int]] = {}
    for number, shard in enumerate(contents.shard.tolist()):
        of_shard.setdefault(shard, []).append(number)
    shards = list(of_shard.values())
    rng.shuffle(shards)
    numbers = [number for shard in shards for number in shard]
    turn = rng.randrange(len(numbers))
    return list(shuffled(iter(numbers[turn:] + numbers[:turn]), shuffle_buffer, rng))


def alike(order: Sequence[int], lengths: Sequence[float], size: int, group: int, seed: str) -> list[int]:
    """An epoch's order in which the samples of a batch are of similar length, so that little of it is padding.

    Batches are cut from the samples of ``group`` batches in the order of their lengths, and these batches are shuffled
    (``group_by_length`` of transformers' Trainer). Samples that fill no batch stay at the end, where training leaves
    them out.

    Args:
        order: Sample numbers in the order of the epoch.
        lengths: Length of each sample, by its number.
        size: Samples of a batch, of all ranks together.
        group: Batches among whose samples lengths are sorted.
        seed: What decides the order of batches.
    """
    rng, whole, found = random.Random(seed), len(order) // size * size, []
    for first in range(0, whole, group * size):
        window = sorted(order[first : min(first + group * size, whole)], key=lambda number: (lengths[number], number))
        batches = [window[place : place + size] for place in range(0, len(window), size)]
        rng.shuffle(batches)
        found += [number for batch in batches for number in batch]
    return [*found, *order[whole:]]


def shuffled(samples: Iterator, size: int, rng: random.Random) -> Iterator:
    """Draw each next sample at random among ``size`` of them; every sample comes out once."""
    buffer = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        i = rng.randrange(size)
        buffer[i], sample = sample, buffer[i]
        yield sample
    rng.shuffle(buffer)
    yield from buffer
