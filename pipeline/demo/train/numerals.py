"""Numbers 0 to 99 spelled out in English, German and Spanish. Knows nothing about sentences."""

from __future__ import annotations

_EN_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_DE_SMALL = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
    "siebzehn achtzehn neunzehn"
).split()
_DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_ES_SMALL = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
    "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis "
    "veintisiete veintiocho veintinueve"
).split()
_ES_TENS = "- - - treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()

_EN_ORDINALS = "- first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_DE_ORDINALS = (
    "- ersten zweiten dritten vierten fünften sechsten siebten achten neunten zehnten elften zwölften"
).split()


def english(n: int) -> str:
    """21 -> "twenty-one"."""
    if n < len(_EN_SMALL):
        return _EN_SMALL[n]
    tens, unit = divmod(n, 10)
    return _EN_TENS[tens] + (f"-{_EN_SMALL[unit]}" if unit else "")


def german(n: int) -> str:
    """21 -> "einundzwanzig": the unit comes first, and one loses its s."""
    if n < len(_DE_SMALL):
        return _DE_SMALL[n]
    tens, unit = divmod(n, 10)
    if not unit:
        return _DE_TENS[tens]
    return ("ein" if unit == 1 else _DE_SMALL[unit]) + "und" + _DE_TENS[tens]


def spanish(n: int) -> str:
    """21 -> "veintiuno", 31 -> "treinta y uno"."""
    if n < len(_ES_SMALL):
        return _ES_SMALL[n]
    tens, unit = divmod(n, 10)
    return _ES_TENS[tens] + (f" y {_ES_SMALL[unit]}" if unit else "")


def english_ordinal(n: int) -> str:
    """1 to 12: the days of a month that the sentences use."""
    return _EN_ORDINALS[n]


def german_ordinal(n: int) -> str:
    """1 to 12, in the dative of a date ("dem ersten Mai")."""
    return _DE_ORDINALS[n]
