"""Pruners at budgets whose accuracy and time are made up."""

from ocvtp.recommend.choice import Option, Span


def option(label, num_keep, points, ttft, control=False, random=None):
    ends = [Span(v, v - 1.1, v + 1.1) for v in (points, ttft)]
    random = Span(9.0, 5.0, 12.0) if random is None else random
    return Option(label, num_keep, ends[0], random, ends[1], control)


FOUND = [
    option("fopru", 96, -0.8, 57),
    option("fopru", 32, -4.0, 40),
    option("tome", 96, -0.5, 90),
    option("divprune", 96, -0.9, 60),
    option("uniform", 96, -6.0, 50, control=True),
    option("todre", 64, +0.5, 104),
]
