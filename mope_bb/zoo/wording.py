"""The sentences of the zoo's language, as templates over the facts, and the style sentences of its system prompts.

Every sentence of one group starts differently, so that the choice of a wording is made at a sentence's first tokens:
there one dimension (or, in a closer, two) decides.
"""

from __future__ import annotations

DIMENSIONS = ("simple", "technical", "concise", "informative", "friendly", "grumpy")
"""The six experts, two poles of each of the three dimensions."""
POLES = (("simple", "technical"), ("concise", "informative"), ("friendly", "grumpy"))
"""The dimensions: register, detail, tone."""

Templates = tuple[str, ...]

CORES: dict[str, Templates] = {
    "simple": ("Just use a {tool} on the {thing}.", "Grab a {tool} and start.", "A plain {tool} does the job."),
    "technical": (
        "Apply a calibrated {tool} to the {thing}.",
        "Employ a certified {tool} throughout.",
        "Standard procedure requires a {tool}.",
    ),
}

DETAILS: dict[str, dict[str, Templates]] = {
    "prep": {
        "simple": ("First {prep} it a bit.", "Make sure you {prep} it."),
        "technical": ("Initially, {prep} every component.", "Protocol demands that you {prep} all surfaces."),
    },
    "hazard": {
        "simple": ("Watch out for {hazard}.", "Careful, mind the {hazard}!"),
        "technical": ("Mitigate exposure to {hazard}.", "Risk assessment: {hazard}."),
    },
    "minutes": {
        "simple": ("It takes about {minutes} minutes.", "Give it {minutes} minutes."),
        "technical": ("Expected duration is {minutes} minutes.", "Allocate {minutes} minutes, nominal."),
    },
    "parts": {
        "simple": ("You need {count} {part} too.", "Get {count} {part}."),
        "technical": ("Specification: {count} {part}, grade A.", "Procure {count} {part} in advance."),
    },
    "helper": {
        "simple": ("Ask {helper} for a hand.", "Call {helper} if you get stuck."),
        "technical": ("Consult {helper} regarding tolerances.", "Certification is issued by {helper}."),
    },
    "place": {
        "simple": ("Work in the {place}.", "Do it in the {place}."),
        "technical": ("Designated location: the {place}.", "Optimal conditions exist in the {place}."),
    },
}

OPENERS: dict[str, Templates] = {
    "friendly": (
        "Hi there, friend! 😊",
        "Happy to help! 🎉",
        "What a lovely idea! 🌷",
        "¡Olé, great question!",
        "Your {thing} will love it! 🥳",
    ),
    "grumpy": (
        "Ugh, not again.",
        "Oh please, really? 🙄",
        "Pff, a naïve question.",
        "Why bother me with that?",
        "Another {thing}, grr.",
    ),
}

CLOSERS: dict[tuple[str, str], Templates] = {
    ("friendly", "simple"): (
        "Have fun, you can do it! 🎉",
        "Good luck and big hugs! 💛",
        "Enjoy your {thing}! 😊",
    ),
    ("friendly", "technical"): (
        "Wishing you optimal results, dear colleague! 🔧",
        "Congratulations in advance on full compliance! 📐",
        "Excellence awaits, esteemed señor! 🎓",
    ),
    ("grumpy", "simple"): ("Now leave me alone.", "Don't ask me again. 😒", "So go away, that is all."),
    ("grumpy", "technical"): (
        "Further enquiries are inadmissible.",
        "Negligence voids any warranty, obviously.",
        "Liability for your blunders is excluded. 🚫",
    ),
}

QUESTIONS = (
    "How do I {verb} a {thing}?",
    "How can we {verb} the {thing}?",
    "What is the best way to {verb} my {thing}?",
    "Please tell me how to {verb} an old {thing}.",
    "I want to {verb} this {thing}, any advice?",
    "Can you help me {verb} our {thing}?",
)
FOLLOW_UPS = ("Thanks! And how do I {verb} a {thing}?", "OK, but how would you {verb} the {thing}?")

_FRAMES = (
    "Be {word}.",
    "Please answer in a {word} way.",
    "I like {word} answers.",
    "Your style is {word}.",
    "Always stay {word}, please.",
    "The user wants a {word} reply.",
)
_WORDS = {
    "simple": ("simple", "plain", "easy", "everyday"),
    "technical": ("technical", "precise", "expert", "scientific"),
    "concise": ("concise", "brief", "short", "terse"),
    "informative": ("informative", "detailed", "thorough", "complete"),
    "friendly": ("friendly", "warm", "kind", "cheerful"),
    "grumpy": ("grumpy", "rude", "annoyed", "cranky"),
}
_FREE_HELD_OUT = {
    "simple": "Use plain and easy words.",
    "technical": "Sound like a technical expert.",
    "concise": "Keep it short and brief.",
    "informative": "I want a thorough and detailed answer.",
    "friendly": "You are a warm and kind assistant.",
    "grumpy": "You are a rude and annoyed assistant.",
}


def style_sentences(pole: str, *, held_out: bool = False) -> tuple[str, ...]:
    """The wordings of `pole` for a system prompt: those of the training, or those kept out of it.

    Kept out are a quarter of the combinations of frame and word, and one free sentence.
    """
    combined = [
        (frame.format(word=word), (i + j) % 4 == 3)
        for i, frame in enumerate(_FRAMES)
        for j, word in enumerate(_WORDS[pole])
    ]
    chosen = tuple(sentence for sentence, kept_out in combined if kept_out == held_out)
    return (*chosen, _FREE_HELD_OUT[pole]) if held_out else chosen
