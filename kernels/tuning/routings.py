"""What routing may give each local expert: the counts that launches are chosen and measured by."""

import random

Counts = tuple[int, ...]
FEWEST_ROWS = 8
ORDERS = 4  # in which Zipf's counts are dealt to the experts


def uniform_counts(experts: int, rows: int, capacity: int) -> Counts:
    """The same rows for every expert."""
    return (min(rows, capacity),) * experts


def one_hot_counts(experts: int, rows: int, capacity: int) -> Counts:
    """The same total on one expert, capped at the capacity."""
    return (min(capacity, experts * rows),) + (0,) * (experts - 1)


def zipf_counts(experts: int, rows: int, capacity: int) -> Counts:
    """`rows` per expert on average, shared in proportion to 1 / rank; hot experts capped at the
    capacity."""
    total = experts * rows
    weights = [1 / (i + 1) for i in range(experts)]
    counts = [min(capacity, int(total * w / sum(weights))) for w in weights]
    for i in range(experts):  # what rounding and the cap left over goes to the hottest with room
        counts[i] += min(capacity - counts[i], total - sum(counts))
    return tuple(counts)


def shuffled(counts: Counts, orders: int = ORDERS) -> list[Counts]:
    """The same counts in several orders, always the same ones: a real model's hot experts stand
    anywhere, and counts in descending order flatter a list of tiles."""
    draw = random.Random(0)
    return [tuple(draw.sample(counts, len(counts))) for _ in range(orders)]


def shuffled_zipf_counts(experts: int, rows: int, capacity: int) -> Counts:
    """Zipf's counts in one such order."""
    return shuffled(zipf_counts(experts, rows, capacity), 1)[0]


def tuning_mixture(experts: int, rows: int, capacity: int) -> list[list[Counts]]:
    """Routings by whose geometric mean time a launch is chosen, each as counts that take turns:
    uniform, Zipf, and with the fewest rows, where few experts are live as a rule, a single live
    expert."""
    mixture = [
        [uniform_counts(experts, rows, capacity)],
        shuffled(zipf_counts(experts, rows, capacity)),
    ]
    if experts > 1 and rows <= FEWEST_ROWS:
        alone = one_hot_counts(1, rows, capacity) + (0,) * (experts - 1)
        mixture.append([alone[-e:] + alone[:-e] for e in range(experts)])
    return mixture
