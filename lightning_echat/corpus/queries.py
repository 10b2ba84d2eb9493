"""What the users of the corpus ask: a small grammar whose words say nothing about who asks, or how.

Age, gender, emotion and sound event live in the voice only. A model that reads the words alone therefore cannot know
them, which is what makes the corpus a test of hearing. One text in ten of every template is kept from training; each
of its words still occurs in training, in other combinations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SLOTS: dict[str, tuple[str, ...]] = {
    "place": (
        "the city museum", "the train station", "the post office", "the green park", "the book shop",
        "the main library", "the corner bakery", "the flower market", "the swimming pool", "the quiet cafe",
    ),
    "food": (
        "tomato soup", "apple pie", "fried rice", "green salad", "fish cakes",
        "potato stew", "garlic bread", "lemon cake", "cheese noodles", "roast chicken",
    ),
    "music": (
        "some soft jazz", "a piano song", "some guitar music", "a slow waltz", "the morning radio",
        "some rock music", "a folk song", "the violin concert", "a summer song", "some drum music",
    ),
    "action": (
        "call the dentist", "plant the roses", "lock the door", "feed the cat", "buy some milk",
        "post the letter", "wash the car", "close the window", "charge the phone", "book the tickets",
    ),
    "thing": (
        "my blue key", "my red scarf", "the small lamp", "my winter coat", "the kitchen knife",
        "my black bag", "the paper map", "my reading glasses", "the silver spoon", "my brown shoes",
    ),
    "subject": (
        "the moon", "the deep ocean", "black holes", "hot volcanoes", "the desert",
        "tall mountains", "ancient rome", "steam engines", "bright stars", "the north pole",
    ),
    "device": (
        "the kitchen light", "the heater", "the fan", "the television", "the oven",
        "the garden hose", "the alarm", "the computer", "the coffee machine", "the printer",
    ),
    "activity": (
        "play chess", "paint a picture", "fly a kite", "ride a bike", "bake bread",
        "draw a horse", "build a table", "juggle balls", "grow tomatoes", "knit a scarf",
    ),
    "animal": (
        "horses", "rabbits", "elephants", "penguins", "turtles", "spiders", "whales", "owls", "bees", "foxes",
    ),
    "word": (
        "good morning", "thank you", "bread and cheese", "one ticket", "see you tomorrow",
        "red wine", "hot coffee", "my name", "the bill", "welcome home",
    ),
}  # fmt: skip
"""Slot name -> the phrases that fill it."""

TIMES: tuple[str, ...] = (
    "this morning", "this evening", "tomorrow", "on monday", "on tuesday",
    "on friday", "on sunday", "next week", "next month", "after lunch",
)  # fmt: skip
"""When: any question may end in one of these."""

OPENINGS: tuple[str, ...] = ("hello", "excuse me", "well", "so", "listen", "by the way", "now", "please")
"""Any question may begin with one of these."""

TEMPLATES: tuple[tuple[str, str], ...] = (
    ("could you find {place}", "i will find {place}"),
    ("how do i get to {place}", "this way to {place}"),
    ("is {place} open", "yes, {place} is open"),
    ("how do i cook {food}", "let us cook {food}"),
    ("what goes into {food}", "here is what goes into {food}"),
    ("could we make {food}", "let us make {food}"),
    ("play {music}", "i will play {music} now"),
    ("can i hear {music}", "you will hear {music}"),
    ("remind me to {action}", "i will remind you to {action}"),
    ("did i forget to {action}", "i will check if you did"),
    ("when should i {action}", "the best time is today"),
    ("what is the weather at {place}", "i will check the weather"),
    ("where did i put {thing}", "let us look for {thing}"),
    ("do i need {thing}", "yes, bring {thing}"),
    ("tell me about {subject}", "i will describe {subject}"),
    ("do you know a story about {subject}", "i know one about {subject}"),
    ("turn on {device}", "i will turn on {device}"),
    ("is {device} still on", "i will look at {device}"),
    ("teach me to {activity}", "let us {activity} together"),
    ("could i {activity}", "yes, you can {activity}"),
    ("what do {animal} eat", "here is what {animal} eat"),
    ("how long do {animal} sleep", "i will look up {animal}"),
    ("how do you say {word} in french", "here is {word} in french"),
    ("can you spell {word}", "let us spell {word}"),
)
"""(what is asked, the sentence that answers it), over the same slot."""

RESERVED_SHARE = 10
"""One text in so many is never used in training."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question in words: `text` as the user says it, `topic` the sentence that answers it, without a full stop."""

    text: str
    topic: str


def _fill(template: tuple[str, str]) -> list[Query]:
    """Every query of one template, without opening: each phrase of its slot, at each time or none."""
    name = next(name for name in SLOTS if f"{{{name}}}" in template[0])
    return [
        Query(f"{template[0]} {time}".strip().format(**{name: phrase}), template[1].format(**{name: phrase}))
        for phrase in SLOTS[name]
        for time in ("", *TIMES)
    ]


@functools.cache
def queries_of(*, reserved: bool) -> tuple[tuple[Query, ...], ...]:
    """The texts of every template, either those kept from training or the others; openings are not part of them.

    The choice does not depend on any seed: two corpora of different seeds never leak into each other's tests.
    """
    groups = []
    for number, template in enumerate(TEMPLATES):
        queries = _fill(template)
        order = np.random.default_rng(number).permutation(len(queries))
        kept = set(order[: len(queries) // RESERVED_SHARE].tolist())
        groups.append(tuple(query for index, query in enumerate(queries) if (index in kept) == reserved))
    return tuple(groups)


def draw_query(rng: np.random.Generator, *, reserved: bool) -> Query:
    """A query: a template, a text of it, and in half of the cases an opening.

    So many combinations (over 20,000) keep a model from learning the texts by heart instead of listening.
    """
    groups = queries_of(reserved=reserved)
    group = groups[rng.integers(len(groups))]
    query = group[rng.integers(len(group))]
    opening = OPENINGS[rng.integers(len(OPENINGS))] if rng.random() < 0.5 else ""
    return Query(f"{opening} {query.text}".strip(), query.topic)
