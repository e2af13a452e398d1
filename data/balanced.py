"""Balanced k-means: clusters of equal size, by an assignment of least cost.

    minimise  sum_i |x_i - c_a(i)|^2  over assignments a and centres c, each cluster having floor(N / k) or ceil(N / k) points

Lloyd's two steps in turns, both exact, so that the cost never rises: centres are the means of their points, and points are
assigned by `balanced_assignment`. Balance is the whole difference to plain k-means (Gururangan et al. 2023,
arXiv:2303.14177: experts are to see equally much).
"""

import numpy as np


def balanced_assignment(costs: np.ndarray, prices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of N rows to k columns of least total cost whose columns get floor(N / k) or ceil(N / k) rows each.

    costs: (N, k) float. Returns labels (N,) int64 and prices (k,), the proof that no other assignment is cheaper: each row
    is where cost + price is least, and no column that has one row more than another has the lower price. The total is the
    least there is, up to rounding: 1e-12 of the largest cost for each row. `prices` are a guess to begin from (of the last
    round of k-means), which changes the time it takes and, but for ties, not the result.

    Successive shortest paths on the graph of the columns, where the way from a to b costs what it costs to move the
    cheapest row of a to b. Any prices give an assignment that is the cheapest for its own sizes; moving one row along each
    edge of a shortest path from a column that is too large to one that is not keeps it so (Ahuja, Magnanti and Orlin 1993,
    "Network Flows", section 9.7). Time: O(N + k^2) for each edge of a path, and as many paths as rows are too many.
    """
    if costs.ndim != 2 or not costs.size or not np.isfinite(costs).all():
        raise ValueError(f"costs: {costs.shape}; expected finite numbers for at least one row and one column")
    rows, columns = costs.shape
    least, most = rows // columns, -(-rows // columns)
    labels = (costs + (0 if prices is None else prices)).argmin(1)
    sizes = np.bincount(labels, minlength=columns)
    moves, cheapest = np.empty((columns, columns)), np.zeros((columns, columns), np.int64)

    def look(column: int) -> None:
        """What it costs to move a row from `column` to each other, and which row that is."""
        inside = np.flatnonzero(labels == column)
        moves[column] = np.inf
        if len(inside):
            dearer = costs[inside] - costs[inside, column, None]  # (rows of the column, k)
            best = dearer.argmin(0)
            moves[column], cheapest[column] = dearer[best, np.arange(columns)], inside[best]
        moves[column, column] = np.inf

    def move_one(sources: np.ndarray, sinks: np.ndarray, below: float = np.inf) -> bool:
        """Along the cheapest path from a source to a sink, one row an edge; False if that costs no less than `below`."""
        distance, before = _shortest(moves, np.where(sources, 0.0, np.inf))
        column = end = int(np.where(sinks, distance, np.inf).argmin())
        if not sinks[end] or distance[end] >= below:
            return False
        path = []
        while before[column] >= 0:
            path.append((before[column], column))
            column = before[column]
        for a, b in path:
            labels[cheapest[a, b]] = b
        sizes[column] -= 1
        sizes[end] += 1
        for touched in {column, *(b for _, b in path)}:
            look(touched)
        return True

    for column in range(columns):
        look(column)
    while (sizes > most).any():
        move_one(sizes > most, sizes < most)
    while (sizes < least).any():
        move_one(sizes > least, sizes < least)
    gain = -1e-12 * np.abs(costs).max()
    while move_one(sizes > least, sizes < most, below=gain):  # which columns have one row more than the others
        pass

    # Prices: distances in the graph to which a column is added, of no cost to enter from one with room or to leave to one
    # with a row to spare
    whole = np.full((columns + 1, columns + 1), np.inf)
    whole[:columns, :columns] = moves
    whole[:columns, columns] = np.where(sizes < most, 0, np.inf)
    whole[columns, :columns] = np.where(sizes > least, 0, np.inf)
    return labels, -_shortest(whole, np.zeros(columns + 1))[0][:columns]


def _shortest(edges: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bellman-Ford on edges (k, k) from distances (k,): the least ones, and the node before each (-1: none).

    What is shorter by rounding alone is not shorter: so the nodes before never go round in a circle.
    """
    distance, before = distance.copy(), np.full(len(distance), -1)
    finite = edges[np.isfinite(edges)]
    rounding = 1e-12 * max(np.abs(finite).max(initial=0), 1e-300)
    for _ in distance:
        through = distance[:, None] + edges  # (k, k)
        best = through.argmin(0)
        found = through[best, np.arange(len(best))]
        nearer = found < distance - rounding
        if not nearer.any():
            break
        distance[nearer], before[nearer] = found[nearer], best[nearer]
    return distance, before


def balanced_kmeans(
    points: np.ndarray, k: int, *, seed: int = 0, restarts: int = 4, rounds: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) int64 and centres (k, d) of points (N, d): the cheapest of `restarts` descents, each to where nothing moves.

    Each begins from centres drawn as k-means++ draws them (Arthur and Vassilvitskii 2007): a point, with a chance that
    grows with its squared distance from those drawn before. Deterministic from the seed; a local minimum, as of any
    k-means. ValueError for k outside 1 to N, or restarts or rounds below 1.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"k: {k} clusters of {len(points)} points; at least 1 and no more than there are points")
    for name, value in (("restarts", restarts), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: {value} is too small; at least 1")
    random, best = np.random.default_rng(seed), (np.inf, None, None)
    for _ in range(restarts):
        centres, labels, prices = _scattered(points, k, random), None, None
        for _ in range(rounds):
            assigned, prices = balanced_assignment(squared_distances(points, centres), prices)
            if labels is not None and (assigned == labels).all():
                break
            labels = assigned
            centres = np.stack([points[labels == j].mean(0) for j in range(k)])
        cost = squared_distances(points, centres)[np.arange(len(points)), labels].sum()
        best = min(best, (cost, labels, centres), key=lambda found: found[0])
    return best[1:]


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N, k) of (N, d) and (k, d)."""
    return np.stack([((points - centre) ** 2).sum(1) for centre in centres], axis=1)


def _scattered(points: np.ndarray, k: int, random: np.random.Generator) -> np.ndarray:
    """(k, d): points far from each other."""
    chosen = [random.integers(len(points))]
    for _ in range(1, k):
        nearest = squared_distances(points, points[chosen]).min(1)
        total = nearest.sum()
        chosen.append(random.choice(len(points), p=nearest / total if total else None))
    return points[chosen]
