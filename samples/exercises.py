"""Generated exercises: maximum, reversing and sorting."""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

LETTERS = "abcdefghij"
SKILLS = ("max", "reverse", "sort")


@dataclass(frozen=True)
class Exercise:
    """A prompt, its answer, and a key that equivalent exercises share."""

    prompt: str
    answer: str
    key: tuple[str, ...]

    @property
    def text(self) -> str:
        """The exercise as a line pair of a text."""
        return f"{self.prompt} {self.answer}\n"


def draw_exercise(rng: random.Random) -> Exercise:
    """Draw an exercise; where operand order does not matter, all orders share a key."""
    skill = rng.choice(SKILLS)
    if skill == "max":
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        question, answer = f"{a} {b}", str(max(a, b))
        key = (skill, *map(str, sorted((a, b))))
    else:
        letters = rng.choices(LETTERS, k=rng.randint(4, 6))
        ordered = sorted(letters)
        question = " ".join(letters)
        answer = " ".join(ordered if skill == "sort" else reversed(letters))
        key = (skill, *(ordered if skill == "sort" else letters))
    return Exercise(f"Q: {skill} {question} =\nA:", answer, key)


def exercise_stream(
    rng: random.Random, excluded: Collection[tuple[str, ...]] = frozenset()
) -> Iterator[Exercise]:
    """Draw exercises without end, skipping excluded keys."""
    while True:
        exercise = draw_exercise(rng)
        if exercise.key not in excluded:
            yield exercise


def take_bytes(stream: Iterator[Exercise], size: int) -> list[Exercise]:
    """Take exercises from the stream until their text holds at least `size` bytes."""
    taken: list[Exercise] = []
    while size > 0:
        taken.append(next(stream))
        size -= len(taken[-1].text)
    return taken
