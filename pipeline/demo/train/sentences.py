"""A closed parallel domain: every draw gives one sentence in English, German and Spanish.

Sixteen shapes over the tables of `lexicon`. A sentence is held out of training when the CRC-32 of its English text
is divisible by ten; evaluation and the bundled clips use only those. Knows nothing about speech or tokens.

    python -m pipeline.demo.train.sentences --count 5 --seed 1
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from random import Random

from pipeline.demo.train import numerals
from pipeline.demo.train.lexicon import (
    ACTIONS,
    ACTIVITIES,
    ADJECTIVES,
    ANIMALS,
    CITIES,
    DAYS,
    EVENTS,
    MONTHS,
    NAMES,
    PLACES,
    THINGS,
    TIMES,
    WEATHER,
    Adjective,
    Noun,
    Parallel,
)

_DE_THE_NOMINATIVE = {"m": "der", "f": "die", "n": "das"}
_DE_THE_ACCUSATIVE = {"m": "den", "f": "die", "n": "das"}
_ES_THE = {"m": "el", "f": "la"}

_VEHICLES = (
    Parallel("train", "Der Zug", "El tren"),
    Parallel("bus", "Der Bus", "El autobús"),
    Parallel("plane", "Das Flugzeug", "El avión"),
)
_SECRETS = (
    Parallel("The code is", "Der Code ist", "El código es"),
    Parallel("My number is", "Meine Nummer ist", "Mi número es"),
)
# What an animal can do to a thing and a thing to nobody: sees, looks for, finds, needs.
_PERCEPTIONS = (ACTIONS[2], ACTIONS[4], ACTIONS[5], ACTIONS[7])


def is_held_out(english: str) -> bool:
    """True for the tenth of all sentences that training never sees, in any language."""
    return zlib.crc32(english.encode()) % 10 == 0


def draw(random: Random) -> Parallel:
    """One sentence, from either side of the split."""
    return random.choice(_SHAPES)(random)


def draw_split(random: Random, *, held_out: bool) -> Parallel:
    """One sentence from the side of the split that is asked for."""
    while True:
        sentence = draw(random)
        if is_held_out(sentence.en) == held_out:
            return sentence


# --- noun phrases -----------------------------------------------------------------------------------------------


def _subject(noun: Noun, adjective: Adjective) -> Parallel:
    return Parallel(
        f"the {adjective.en} {noun.en}",
        f"{_DE_THE_NOMINATIVE[noun.de_gender]} {adjective.de}e {noun.de}",
        f"{_ES_THE[noun.es_gender]} {noun.es} {adjective.spanish(noun.es_gender)}",
    )


def _object(noun: Noun, adjective: Adjective) -> Parallel:
    ending = "en" if noun.de_gender == "m" else "e"
    return Parallel(
        f"the {adjective.en} {noun.en}",
        f"{_DE_THE_ACCUSATIVE[noun.de_gender]} {adjective.de}{ending} {noun.de}",
        f"{_ES_THE[noun.es_gender]} {noun.es} {adjective.spanish(noun.es_gender)}",
    )


def _counted(noun: Noun, adjective: Adjective, count: int) -> Parallel:
    return Parallel(
        f"{numerals.english(count)} {adjective.en} {noun.en_plural}",
        f"{numerals.german(count)} {adjective.de}e {noun.de_plural}",
        f"{numerals.spanish(count)} {noun.es_plural} {_spanish_plural(adjective.spanish(noun.es_gender))}",
    )


def _spanish_plural(word: str) -> str:
    if word[-1] in "aeiou":
        return word + "s"
    return {"marrón": "marrones"}.get(word, word + "es")


def _draw_count(random: Random, highest: int = 60) -> int:
    """A count from 2, small ones more often; none that ends in one, where the languages disagree about plurals."""
    while True:
        count = random.choice([random.randint(2, 12), random.randint(2, highest)])
        if count % 10 != 1:
            return count


def _capitalised(sentence: Parallel) -> Parallel:
    return Parallel(*(text[0].upper() + text[1:] for text in sentence))


# --- the sixteen shapes -----------------------------------------------------------------------------------------


def _trades_in_city(random: Random) -> Parallel:
    name, does = random.choice(NAMES), random.choice(ACTIONS)
    goods = _counted(random.choice(THINGS), random.choice(ADJECTIVES), _draw_count(random))
    city = random.choice(CITIES)
    return Parallel(
        f"{name} {does.en} {goods.en} in {city.en}.",
        f"{name} {does.de} {goods.de} in {city.de}.",
        f"{name} {does.es} {goods.es} en {city.es}.",
    )


def _animal_on_day(random: Random) -> Parallel:
    day, animal = random.choice(DAYS), random.choice(ANIMALS)
    does, place = random.choice(ACTIVITIES), random.choice(PLACES)
    return Parallel(
        f"On {day.en} the {animal.en} {does.en} {place.en}.",
        f"Am {day.de} {does.de} {_DE_THE_NOMINATIVE[animal.de_gender]} {animal.de} {place.de}.",
        f"El {day.es} {_ES_THE[animal.es_gender]} {animal.es} {does.es} {place.es}.",
    )


def _animal_and_thing(random: Random) -> Parallel:
    subject = _subject(random.choice(ANIMALS), random.choice(ADJECTIVES))
    thing = _object(random.choice(THINGS + ANIMALS), random.choice(ADJECTIVES))
    does = random.choice(_PERCEPTIONS)
    return _capitalised(
        Parallel(
            f"{subject.en} {does.en} {thing.en}.",
            f"{subject.de} {does.de} {thing.de}.",
            f"{subject.es} {does.es} {thing.es}.",
        )
    )


def _event_on_date(random: Random) -> Parallel:
    event, weekday = random.choice(EVENTS), random.choice(DAYS)
    day, month = random.randint(1, 12), random.choice(MONTHS)
    spanish_day = "primero" if day == 1 else numerals.spanish(day)
    return Parallel(
        f"{event.en} is on {weekday.en}, the {numerals.english_ordinal(day)} of {month.en}.",
        f"{event.de} ist am {weekday.de}, dem {numerals.german_ordinal(day)} {month.de}.",
        f"{event.es} es el {weekday.es} {spanish_day} de {month.es}.",
    )


def _departure(random: Random) -> Parallel:
    city, hour = random.choice(CITIES), random.randint(2, 12)
    vehicle = random.choice(_VEHICLES)
    return Parallel(
        f"The {vehicle.en} to {city.en} leaves at {numerals.english(hour)} o'clock.",
        f"{vehicle.de} nach {city.de} startet um {numerals.german(hour)} Uhr.",
        f"{vehicle.es} a {city.es} sale a las {numerals.spanish(hour)}.",
    )


def _digits(random: Random) -> Parallel:
    digits = [random.randint(0, 9) for _ in range(random.randint(3, 6))]
    secret = random.choice(_SECRETS)
    return Parallel(
        f"{secret.en} {' '.join(map(numerals.english, digits))}.",
        f"{secret.de} {' '.join(map(numerals.german, digits))}.",
        f"{secret.es} {' '.join(map(numerals.spanish, digits))}.",
    )


def _weather(random: Random) -> Parallel:
    city, weather, when = random.choice(CITIES), random.choice(WEATHER), random.choice(TIMES[:4])
    return Parallel(
        f"It is {weather.en} in {city.en} {when.en}.",
        f"Es ist {when.de} {weather.de} in {city.de}.",
        f"{when.es[0].upper()}{when.es[1:]} hace {weather.es} en {city.es}.",
    )


def _how_many(random: Random) -> Parallel:
    noun, name = random.choice(THINGS + ANIMALS), random.choice(NAMES)
    how_many = "¿Cuántos" if noun.es_gender == "m" else "¿Cuántas"
    return Parallel(
        f"How many {noun.en_plural} does {name} have?",
        f"Wie viele {noun.de_plural} hat {name}?",
        f"{how_many} {noun.es_plural} tiene {name}?",
    )


def _order(random: Random) -> Parallel:
    first, second = random.sample(THINGS, 2)
    n_first, n_second = _draw_count(random, 12), _draw_count(random, 12)
    spell_en, spell_de, spell_es = numerals.english, numerals.german, numerals.spanish
    return Parallel(
        f"I would like {spell_en(n_first)} {first.en_plural} and {spell_en(n_second)} {second.en_plural}, please.",
        f"Ich möchte {spell_de(n_first)} {first.de_plural} und {spell_de(n_second)} {second.de_plural}, bitte.",
        f"Quisiera {spell_es(n_first)} {first.es_plural} y {spell_es(n_second)} {second.es_plural}, por favor.",
    )


def _arithmetic(random: Random) -> Parallel:
    a, b = random.randint(1, 60), random.randint(1, 39)
    if random.random() < 0.5:
        return _equation(a, ("plus", "plus", "más"), b, a + b)
    return _equation(a + b, ("minus", "minus", "menos"), b, a)


def _equation(left: int, operator: tuple[str, str, str], right: int, result: int) -> Parallel:
    spelled = [
        f"{spell(left)} {word} {spell(right)} {equals} {spell(result)}."
        for spell, word, equals in zip(
            (numerals.english, numerals.german, numerals.spanish), operator, ("is", "ist", "son"), strict=True
        )
    ]
    return _capitalised(Parallel(*spelled))


def _price(random: Random) -> Parallel:
    thing = _subject(random.choice(THINGS), random.choice(ADJECTIVES))
    euros = _draw_count(random, 98)
    return _capitalised(
        Parallel(
            f"{thing.en} costs {numerals.english(euros)} euros.",
            f"{thing.de} kostet {numerals.german(euros)} Euro.",
            f"{thing.es} cuesta {numerals.spanish(euros)} euros.",
        )
    )


def _age(random: Random) -> Parallel:
    name, years, city = random.choice(NAMES), _draw_count(random, 98), random.choice(CITIES)
    return Parallel(
        f"{name} is {numerals.english(years)} years old and lives in {city.en}.",
        f"{name} ist {numerals.german(years)} Jahre alt und wohnt in {city.de}.",
        f"{name} tiene {numerals.spanish(years)} años y vive en {city.es}.",
    )


def _together(random: Random) -> Parallel:
    first, second = random.sample(NAMES, 2)
    does, place = random.choice(ACTIVITIES), random.choice(PLACES)
    return Parallel(
        f"{first} {does.en} with {second} {place.en}.",
        f"{first} {does.de} mit {second} {place.de}.",
        f"{first} {does.es} con {second} {place.es}.",
    )


def _quality(random: Random) -> Parallel:
    noun, quality = random.choice(THINGS + ANIMALS), random.choice(ADJECTIVES)
    other = random.choice([adjective for adjective in ADJECTIVES if adjective is not quality])
    gender = noun.es_gender
    return _capitalised(
        Parallel(
            f"the {noun.en} is {quality.en} and not {other.en}.",
            f"{_DE_THE_NOMINATIVE[noun.de_gender]} {noun.de} ist {quality.de} und nicht {other.de}.",
            f"{_ES_THE[gender]} {noun.es} es {quality.spanish(gender)} y no {other.spanish(gender)}.",
        )
    )


def _habit(random: Random) -> Parallel:
    name, does = random.choice(NAMES), random.choice(ACTIVITIES)
    when, place = random.choice(TIMES), random.choice(PLACES)
    return Parallel(
        f"{name} {does.en} {place.en} {when.en}.",
        f"{name} {does.de} {when.de} {place.de}.",
        f"{name} {does.es} {place.es} {when.es}.",
    )


def _journey(random: Random) -> Parallel:
    name = random.choice(NAMES)
    origin, goal = random.sample(CITIES, 2)
    day = random.choice(DAYS)
    return Parallel(
        f"{name} travels from {origin.en} to {goal.en} on {day.en}.",
        f"{name} reist am {day.de} von {origin.de} nach {goal.de}.",
        f"{name} viaja de {origin.es} a {goal.es} el {day.es}.",
    )


# The first three hold most words, so they are drawn twice as often.
_SHAPES: tuple[Callable[[Random], Parallel], ...] = (
    _trades_in_city,
    _trades_in_city,
    _animal_on_day,
    _animal_on_day,
    _animal_and_thing,
    _animal_and_thing,
    _event_on_date,
    _departure,
    _digits,
    _weather,
    _how_many,
    _order,
    _arithmetic,
    _price,
    _age,
    _together,
    _quality,
    _habit,
    _journey,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print sentences of the demo domain, tab-separated.")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="only sentences that training never sees")
    options = parser.parse_args()
    random = Random(options.seed)
    for _ in range(options.count):
        print("\t".join(draw_split(random, held_out=True) if options.held_out else draw(random)))


if __name__ == "__main__":
    main()
