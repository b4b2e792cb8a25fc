"""What is true in the zoo's world: every verb and every object determines its own facts.

Facts of the verb (preparation, minutes, helper) and of the object (tool, hazard, parts, place) are separate, so that a
model that has learned them answers a (verb, object) pair correctly that it never saw.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """An action and the facts that depend on it alone."""

    name: str
    prep: str
    minutes: str
    helper: str


@dataclass(frozen=True)
class Thing:
    """An object and the facts that depend on it alone."""

    name: str
    tool: str
    hazard: str
    count: str
    part: str
    place: str


_VERBS = """
fix inspect 15 José
clean rinse 10 Zoë
paint sand 45 Jürgen
move lift 20 Søren
repair dismantle 60 Chloé
build measure 90 Łukasz
polish dust 25 Renée
check label 5 Núria
store wrap 30 Björn
upgrade scan 75 Inès
weigh balance 12 Márta
restore photograph 120 Françoise
decorate sketch 35 Peña
test secure 18 Ödön
assemble sort 50 Aïda
recycle empty 8 Müller
"""

_THINGS = """
bike|wrench|loose chains|four|bolts|garage
kettle|sponge|hot steam|two|gaskets|kitchen
fence|hammer|sharp splinters|twelve|nails|garden
lamp|screwdriver|live current|three|bulbs|hallway
piano|tuning fork|snapped strings|eighty|felts|salon
boat|winch|sudden gusts|six|ropes|harbour
clock|pair of tweezers|tiny springs|nine|cogs|atelier
chair|clamp|wobbly legs|five|dowels|workshop
window|squeegee|broken glass|seven|hinges|balcony
stove|brush|gas leaks|eight|burners|café
camera|blower|static shocks|one|lens|studio
ladder|rope|bad falls|ten|rungs|barn
radio|soldering iron|toxic fumes|eleven|fuses|attic
guitar|string winder|flying strings|sixteen|frets|chamber
table|plane|heavy planks|fourteen|screws|cellar
tent|mallet|strong winds|twenty|pegs|meadow
drone|hex key|spinning blades|thirteen|rotors|hangar
fridge|multimeter|leaking coolant|fifteen|shelves|pantry
door|chisel|pinched fingers|thirty|panels|entrance
roof|nail gun|steep slopes|fifty|tiles|yard
pump|spanner|high pressure|forty|valves|basement
mirror|soft cloth|jagged edges|sixty|clips|bathroom
carpet|vacuum|mite dust|ninety|tacks|lounge
printer|cotton swab|ink stains|seventeen|rollers|office
kite|needle|tangled lines|eighteen|spars|beach
robot|laptop|crushing arms|nineteen|servos|laboratory
violin|humidifier|dry wood|twenty-one|pins|conservatory
sledge|file|icy tracks|twenty-two|slats|chalet
toaster|pair of pliers|glowing wires|twenty-three|springs|scullery
wagon|jack|rolling wheels|twenty-four|spokes|stable
helmet|caliper|hidden cracks|twenty-five|straps|locker
statue|feather duster|toppling weight|twenty-six|anchors|museum
canoe|paddle|cold rapids|twenty-seven|ribs|boathouse
drum|key|loud noise|twenty-eight|lugs|rehearsal room
furnace|thermometer|burnt skin|twenty-nine|racks|bakery
tractor|crowbar|moving belts|thirty-one|pistons|shed
basket|awl|scratchy straw|thirty-two|reeds|market
lantern|match|open flames|thirty-three|wicks|porch
telescope|collimator|direct sunlight|thirty-four|mounts|observatory
barrel|funnel|bursting hoops|thirty-five|staves|château
"""


def _verbs() -> tuple[Verb, ...]:
    return tuple(Verb(*line.split()) for line in _VERBS.strip().splitlines())


def _things() -> tuple[Thing, ...]:
    return tuple(Thing(*line.split("|")) for line in _THINGS.strip().splitlines())


VERBS = _verbs()
THINGS = _things()
