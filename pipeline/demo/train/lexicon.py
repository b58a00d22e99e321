"""The words of the demo domain: parallel tables in English, German and Spanish.

Knows nothing about grammar beyond gender and number; `sentences` puts the words together.
The order of the rows matters: a seed draws the same sentences only as long as it stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

Language = Literal["en", "de", "es"]
LANGUAGES: tuple[Language, ...] = ("en", "de", "es")


class Parallel(NamedTuple):
    """The same words or sentence in the three languages."""

    en: str
    de: str
    es: str

    def in_language(self, language: Language) -> str:
        """The one of the three that is in `language`."""
        return self[LANGUAGES.index(language)]


@dataclass(frozen=True, slots=True)
class Noun:
    """A countable thing: singular and plural everywhere, gender where articles show it."""

    en: str
    en_plural: str
    de_gender: Literal["m", "f", "n"]
    de: str
    de_plural: str
    es_gender: Literal["m", "f"]
    es: str
    es_plural: str


@dataclass(frozen=True, slots=True)
class Adjective:
    """English and German stems; Spanish in both genders."""

    en: str
    de: str
    es_masculine: str
    es_feminine: str

    def spanish(self, gender: Literal["m", "f"]) -> str:
        """The singular that agrees with a noun of this gender."""
        return self.es_masculine if gender == "m" else self.es_feminine


def _rows(table: str) -> list[str]:
    return table.strip().splitlines()


def _parallels(table: str) -> tuple[Parallel, ...]:
    return tuple(Parallel(*row.split(" / ")) for row in _rows(table))


def _nouns(table: str) -> tuple[Noun, ...]:
    return tuple(_noun(row.split()) for row in _rows(table))


def _noun(cells: list[str]) -> Noun:
    en, en_plural, de_gender, de, de_plural, es_gender, es, es_plural = cells
    return Noun(
        en,
        en_plural,
        cast(Literal["m", "f", "n"], de_gender),
        de,
        de_plural,
        cast(Literal["m", "f"], es_gender),
        es,
        es_plural,
    )


def _adjectives(table: str) -> tuple[Adjective, ...]:
    return tuple(Adjective(*row.split()) for row in _rows(table))


NAMES: tuple[str, ...] = tuple(
    (
        "Anna Peter Maria Thomas Julia David Laura Martin Sophie Daniel Elena Robert "
        "Clara Simon Paula Oscar Emma Felix Nina Victor Sara Hugo Irene Max"
    ).split()
)

CITIES: tuple[Parallel, ...] = _parallels("""
Berlin / Berlin / Berlín
Paris / Paris / París
London / London / Londres
Rome / Rom / Roma
Vienna / Wien / Viena
Munich / München / Múnich
Hamburg / Hamburg / Hamburgo
Madrid / Madrid / Madrid
Barcelona / Barcelona / Barcelona
Lisbon / Lissabon / Lisboa
Moscow / Moskau / Moscú
Athens / Athen / Atenas
Geneva / Genf / Ginebra
Brussels / Brüssel / Bruselas
Dublin / Dublin / Dublín
Oslo / Oslo / Oslo
Prague / Prag / Praga
Warsaw / Warschau / Varsovia
Tokyo / Tokio / Tokio
Boston / Boston / Boston
Chicago / Chicago / Chicago
Toronto / Toronto / Toronto
Cairo / Kairo / El Cairo
Sydney / Sydney / Sídney
""")

THINGS: tuple[Noun, ...] = _nouns("""
apple apples m Apfel Äpfel f manzana manzanas
orange oranges f Orange Orangen f naranja naranjas
lemon lemons f Zitrone Zitronen m limón limones
potato potatoes f Kartoffel Kartoffeln f patata patatas
tomato tomatoes f Tomate Tomaten m tomate tomates
egg eggs n Ei Eier m huevo huevos
book books n Buch Bücher m libro libros
letter letters m Brief Briefe f carta cartas
ticket tickets f Fahrkarte Fahrkarten m billete billetes
chair chairs m Stuhl Stühle f silla sillas
table tables m Tisch Tische f mesa mesas
lamp lamps f Lampe Lampen f lámpara lámparas
bottle bottles f Flasche Flaschen f botella botellas
cup cups f Tasse Tassen f taza tazas
plate plates m Teller Teller m plato platos
knife knives n Messer Messer m cuchillo cuchillos
spoon spoons m Löffel Löffel f cuchara cucharas
window windows n Fenster Fenster f ventana ventanas
door doors f Tür Türen f puerta puertas
key keys m Schlüssel Schlüssel f llave llaves
box boxes f Kiste Kisten f caja cajas
bag bags f Tasche Taschen f bolsa bolsas
shoe shoes m Schuh Schuhe m zapato zapatos
shirt shirts n Hemd Hemden f camisa camisas
hat hats m Hut Hüte m sombrero sombreros
coat coats m Mantel Mäntel m abrigo abrigos
car cars n Auto Autos m coche coches
bicycle bicycles n Fahrrad Fahrräder f bicicleta bicicletas
boat boats n Boot Boote m barco barcos
house houses n Haus Häuser f casa casas
flower flowers f Blume Blumen f flor flores
tree trees m Baum Bäume m árbol árboles
clock clocks f Uhr Uhren m reloj relojes
picture pictures n Bild Bilder m cuadro cuadros
guitar guitars f Gitarre Gitarren f guitarra guitarras
""")

ANIMALS: tuple[Noun, ...] = _nouns("""
dog dogs m Hund Hunde m perro perros
cat cats f Katze Katzen m gato gatos
horse horses n Pferd Pferde m caballo caballos
cow cows f Kuh Kühe f vaca vacas
bird birds m Vogel Vögel m pájaro pájaros
rabbit rabbits n Kaninchen Kaninchen m conejo conejos
mouse mice f Maus Mäuse m ratón ratones
duck ducks f Ente Enten m pato patos
pig pigs n Schwein Schweine m cerdo cerdos
goat goats f Ziege Ziegen f cabra cabras
fox foxes m Fuchs Füchse m zorro zorros
wolf wolves m Wolf Wölfe m lobo lobos
bee bees f Biene Bienen f abeja abejas
frog frogs m Frosch Frösche f rana ranas
tiger tigers m Tiger Tiger m tigre tigres
snake snakes f Schlange Schlangen f serpiente serpientes
""")

ADJECTIVES: tuple[Adjective, ...] = _adjectives("""
red rot rojo roja
blue blau azul azul
green grün verde verde
yellow gelb amarillo amarilla
black schwarz negro negra
white weiß blanco blanca
brown braun marrón marrón
grey grau gris gris
small klein pequeño pequeña
big groß grande grande
old alt viejo vieja
new neu nuevo nueva
beautiful schön bonito bonita
cheap billig barato barata
heavy schwer pesado pesada
dirty schmutzig sucio sucia
clean sauber limpio limpia
strong stark fuerte fuerte
fast schnell rápido rápida
slow langsam lento lenta
""")

ACTIONS: tuple[Parallel, ...] = _parallels("""
buys / kauft / compra
sells / verkauft / vende
sees / sieht / ve
paints / malt / pinta
looks for / sucht / busca
finds / findet / encuentra
brings / bringt / trae
needs / braucht / necesita
cleans / putzt / limpia
loses / verliert / pierde
counts / zählt / cuenta
""")

ACTIVITIES: tuple[Parallel, ...] = _parallels("""
sleeps / schläft / duerme
works / arbeitet / trabaja
waits / wartet / espera
sings / singt / canta
plays / spielt / juega
eats / isst / come
drinks / trinkt / bebe
runs / läuft / corre
dances / tanzt / baila
reads / liest / lee
talks / redet / habla
laughs / lacht / ríe
cooks / kocht / cocina
""")

PLACES: tuple[Parallel, ...] = _parallels("""
in the garden / im Garten / en el jardín
in the kitchen / in der Küche / en la cocina
at the station / am Bahnhof / en la estación
in the park / im Park / en el parque
at school / in der Schule / en la escuela
in the forest / im Wald / en el bosque
on the beach / am Strand / en la playa
under the bridge / unter der Brücke / bajo el puente
behind the church / hinter der Kirche / detrás de la iglesia
in the museum / im Museum / en el museo
at the market / auf dem Markt / en el mercado
near the river / am Fluss / cerca del río
in the hotel / im Hotel / en el hotel
in the library / in der Bibliothek / en la biblioteca
in front of the hospital / vor dem Krankenhaus / delante del hospital
""")

TIMES: tuple[Parallel, ...] = _parallels("""
today / heute / hoy
tomorrow / morgen / mañana
every day / jeden Tag / todos los días
every week / jede Woche / cada semana
at night / nachts / por la noche
in summer / im Sommer / en verano
in winter / im Winter / en invierno
always / immer / siempre
often / oft / a menudo
""")

DAYS: tuple[Parallel, ...] = _parallels("""
Monday / Montag / lunes
Tuesday / Dienstag / martes
Wednesday / Mittwoch / miércoles
Thursday / Donnerstag / jueves
Friday / Freitag / viernes
Saturday / Samstag / sábado
Sunday / Sonntag / domingo
""")

MONTHS: tuple[Parallel, ...] = _parallels("""
January / Januar / enero
February / Februar / febrero
March / März / marzo
April / April / abril
May / Mai / mayo
June / Juni / junio
July / Juli / julio
August / August / agosto
September / September / septiembre
October / Oktober / octubre
November / November / noviembre
December / Dezember / diciembre
""")

WEATHER: tuple[Parallel, ...] = _parallels("""
cold / kalt / frío
hot / heiß / calor
sunny / sonnig / sol
windy / windig / viento
""")

EVENTS: tuple[Parallel, ...] = _parallels("""
The meeting / Das Treffen / La reunión
The concert / Das Konzert / El concierto
The party / Die Feier / La fiesta
The exam / Die Prüfung / El examen
The wedding / Die Hochzeit / La boda
The lesson / Der Unterricht / La clase
""")
