"""The statistic of a key as its documentation defines it, one key at a time in plain Python: what fast code must give."""

from statistics import fmean, variance


def leaning(cells, table):
    """``R[a, b, c][t]`` from a table ``(cells, classes)``, for the classes that are no source."""
    return {
        (a, b, way): {t: float(value) for t, value in enumerate(row) if t not in (a, b)}
        for (a, b, way), row in zip(cells.tolist(), table.tolist(), strict=True)
    }


def statistic(leans, key, weight=2.0):
    """T of one key ``(a, b, t, way)``."""
    a, b, target, way = key
    others = sorted({other for *_, other in leans} - {way})
    asked = sorted({(x, y) for x, y, _ in leans if target not in (x, y)})

    def above_the_way(x, y, c):
        return leans[x, y, c][target] - fmean(leans[(*pair, c)][target] for pair in asked)

    def above_both(x, y):
        own = leans[x, y, way][target]
        return (above_the_way(x, y, way) + own - fmean(leans[x, y, c][target] for c in others)) / 2

    row = [above_both(x, y) for x, y in asked if x == a and y != b]
    column = [above_both(x, y) for x, y in asked if x != a and y == b]
    reverse = fmean(above_the_way(b, a, c) for c in others) if (b, a) in asked else 0.0
    beside = sum(row) / max(len(row), 8) + sum(column) / max(len(column), 8) + reverse
    return (above_the_way(a, b, way) + weight * beside) / (1 + 3 * weight)


def above(own, references, usual_of=None):
    """The suspect's ``R`` above the references', cell by cell; ``usual_of`` are the classes that the usual variance is taken of."""
    each = {(cell, t): [known[cell][t] for known in references] for cell, row in own.items() for t in row}
    degrees, usual = len(references) - 1, 0.0
    if degrees:
        usual = fmean(variance(values) for (_, t), values in each.items() if usual_of is None or t in usual_of)

    def excess(cell, t):
        values = each[cell, t]
        plain = own[cell][t] - fmean(values)
        if not usual:
            return plain
        return plain * (usual * (4 + degrees) / (4 * usual + degrees * variance(values))) ** 0.5

    return {cell: {t: excess(cell, t) for t in row} for cell, row in own.items()}


def thousandths(probabilities, sources):
    """What one answer says beside two sources: each other class's part of the rest, in whole thousandths."""
    rest = [0.0 if t in sources else p + 1e-4 for t, p in enumerate(probabilities)]
    return [int(1000 * part / sum(rest)) for part in rest]
