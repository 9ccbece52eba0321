"""Arithmetic word problems: one or two steps over small numbers, drawn by a seed, with an exact answer."""

import random
from collections.abc import Iterator

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Lea", "Max")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers")


def problem(generator: random.Random) -> tuple[str, int]:
    """(question, answer), the answer in 0..27."""
    name, other = generator.sample(NAMES, 2)
    things = generator.choice(THINGS)
    a, b, c = (generator.randint(2, 9) for _ in range(3))
    few, many = generator.randint(2, 5), generator.randint(2, 5)
    part = generator.randint(1, a + b)
    kinds = (
        (f"{name} has {a} {things} and finds {b} more. How many {things} does {name} have?", a + b),
        (f"{name} has {a + b} {things} and loses {b}. How many {things} are left?", a),
        (
            f"{name} has {a} {things}, gets {b} more and gives {part} to {other}. How many {things} does {name} keep?",
            a + b - part,
        ),
        (f"{name} buys {few} bags with {many} {things} each. How many {things} is that?", few * many),
        (f"{name} has {a} {things}. {other} has {c} more than {name}. How many do both have?", 2 * a + c),
        (f"{few} friends share {few * many} {things} equally. How many does each of them get?", many),
    )
    return kinds[generator.randrange(len(kinds))]


def problems(seed: int) -> Iterator[tuple[str, int]]:
    """Endless different problems of a seed; no question comes twice."""
    generator, seen = random.Random(seed), set()
    while True:
        question, answer = problem(generator)
        if question not in seen:
            seen.add(question)
            yield question, answer
