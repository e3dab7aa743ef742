"""Questions that come without a picture, which pebble answers by saying that it needs one.

Half of them are questions of its world, the others anything that people type: general knowledge,
requests, greetings, single words, sums, and words that mean nothing. Knows English, no pixels.
"""

import string
from typing import Final

import numpy as np

from pebble.conversation import draw_questions
from pebble.reference import Question, Rng, pick
from pebble.sample import sample_scene
from pebble.scene import Scene
from pebble.words import SUBJECTS, TALK, THINGS, VERBS, WHENS

NEEDS_PICTURE: Final = "I need a picture to answer that"
_OPENINGS: Final = (
    "What is {thing}?", "Who is {who}?", "Where is {thing}?", "Why is {thing} {adjective}?",
    "How does {thing} work?", "Tell me about {thing}.", "Explain {thing}.", "Write about {thing}.",
    "Write a {adjective} poem about {thing}.", "How old is {who}?", "When was {who} born?",
    "What is the {property} of {thing}?", "What is the {property} of {who}?", "{thing}",
    "the {property} of {thing}", "Which {noun} is the {adjective} one?", "Can you {verb} {thing}?",
    "How many {noun}s does {who} have?", "Translate {thing} into French.", "{verb} {thing}",
    "Do you know {who}?", "Is {thing} {adjective}?", "Does {who} {verb} {thing}?", "{who} {verb}",
    "What do you think of {thing}?", "How much is {thing}?", "Please {verb} {thing}.", "{noun}",
    "Give me a list of {noun}s.", "How do I {verb} a {noun}?", "Should I {verb} {thing}?",
    "Who {verb}s {thing}?", "Name a {adjective} {noun}.", "What rhymes with {noun}?", "{adjective}",
)  # fmt: skip
_PROPERTIES: Final = (
    "name", "price", "height", "weight", "language", "currency", "history", "meaning", "age",
    "author", "temperature", "distance", "speed", "population", "president", "largest city", "end",
)  # fmt: skip
_NAMES: Final = (
    "Germany", "Japan", "Brazil", "Rome", "London", "Africa", "Europe", "China", "the moon",
    "the sun", "the ocean", "Mozart", "Shakespeare", "Newton", "water", "gold", "music", "football",
    "chess", "love", "time", "the universe", "a computer", "Python", "a neural network", "history",
    "mathematics", "biology", "the weather", "tomorrow", "a tiger", "an elephant", "a rainbow",
)  # fmt: skip
_ADJECTIVES: Final = (
    "good", "long", "old", "fast", "expensive", "happy", "famous", "difficult", "cold", "beautiful",
    "important", "short", "deep", "round", "red", "green", "small", "large", "strange", "true",
)  # fmt: skip
_NOUNS: Final = (
    "country", "river", "animal", "planet", "friend", "game", "song", "recipe", "number", "word",
    "colour", "picture", "photo", "person", "tree", "car", "bird", "language", "letter", "circle",
    "square", "star", "joke", "story", "bread", "train", "dream", "machine", "digit", "sentence",
)  # fmt: skip
_DOINGS: Final = (
    "write", "buy", "sell", "cook", "draw", "play", "read", "build", "open", "sing", "learn",
    "describe", "count", "repeat", "help with", "find", "paint", "forget", "summarise", "compare",
)  # fmt: skip
_SHORT: Final = (
    "Hi", "Hi!", "Hey", "Good evening", "Thanks", "Thank you!", "Yes", "No", "ok", "Why?", "Stop",
    "Really?", "How are you?", "What is your name?", "What can you do?", "Help", "Help me", "test",
    "What?", "Who made you?", "Are you a robot?", "Do you understand me?", "Tell me a joke.", ".",
    "Say something.", "Continue.", "Go on", "I am bored.", "I feel sad today.", "Good night.",
    "What day is it?", "How old are you?", "Where are you from?", "Sing a song.", "hm", "x", "?",
)  # fmt: skip
# Asked in the exam alone.
UNHEARD: Final = (
    "What is the capital of France?", "capital of France", "Hello", "Who are you?", "2 + 2?",
    "Who wrote Hamlet?", "How far away is Mars?", "What is the boiling point of water?",
    "Which planet is closest to the sun?", "Write a haiku about autumn leaves.", "Good afternoon!",
    "Solve x + 3 = 10.", "What is seven times eight?", "Is it going to rain in Paris tomorrow?",
    "Translate 'good morning' to Spanish.", "List three prime numbers.", "Who won the world cup?",
    "Explain quantum mechanics to a child.", "What is love?", "Recommend a film for tonight.",
    "How do I tie a tie?", "Define photosynthesis.", "def main():", "SELECT * FROM users;",
    "What's the time in Tokyo?", "My name is Anna.", "Do penguins have knees?", "Bonjour",
    "Why is the sky blue?", "Is the earth flat?", "Which is heavier, iron or feathers?",
    "Summarise the French revolution in one sentence.", "Give me a recipe for pancakes.",
    "How many legs does a spider have?", "What colour is a banana?", "Can pigs fly?",
    "Who painted the Mona Lisa?", "Are you there?", "What have you been trained on?",
    "Write an email to my boss.",
)  # fmt: skip


def blind_question(scene: Scene, rng: Rng) -> Question:
    """Return a question without a picture; the scene only says which questions there are."""
    kind = rng.random()
    if kind < 0.45:
        text = pick(rng, draw_questions(scene, rng)).text
    elif kind < 0.8:
        text = _general(rng)
    elif kind < 0.88:
        text = pick(rng, (*_SHORT, *TALK))
    elif kind < 0.94:
        text = _sum(rng)
    else:
        text = _nonsense(rng)
    return needs_picture(_restyled(text, rng))


def needs_picture(text: str) -> Question:
    """Return the question with its only answer."""
    return Question(skill="no picture", text=text, answer=NEEDS_PICTURE)


def _general(rng: Rng) -> str:
    """Half of them questions and requests, half of them statements."""
    if rng.random() < 0.25:
        return " ".join(pick(rng, words) for words in (SUBJECTS, VERBS, THINGS, WHENS)) + "."
    return pick(rng, _OPENINGS).format(
        thing=pick(rng, (*THINGS, *_NAMES)),
        who=pick(rng, (*SUBJECTS, *_NAMES)),
        adjective=pick(rng, _ADJECTIVES),
        property=pick(rng, _PROPERTIES),
        noun=pick(rng, _NOUNS),
        verb=pick(rng, _DOINGS),
    )


def _sum(rng: Rng) -> str:
    one, other = (int(rng.integers(100)) for _ in range(2))
    ask = pick(rng, ("{} {} {}", "What is {} {} {}?", "{} {} {} =", "How much is {} {} {}?"))
    return ask.format(one, pick(rng, ("+", "-", "*", "/", "plus", "minus", "times")), other)


def _nonsense(rng: Rng) -> str:
    """One to eight words of letters, figures and signs."""
    signs = string.ascii_letters * 2 + string.digits + "!?.,:;-'\"()"
    words = (
        "".join(pick(rng, signs) for _ in range(int(rng.integers(1, 9))))
        for _ in range(int(rng.integers(1, 9)))
    )
    return " ".join(words)


def _restyled(text: str, rng: Rng) -> str:
    """As different people type it: other capitals, without its mark at the end."""
    style = rng.random()
    if style < 0.2:
        text = text.lower()
    elif style < 0.5:
        text = text[:1].upper() + text[1:]
    return text.rstrip("?.") or text if rng.random() < 0.15 else text


def exam_questions(first_seed: int, number: int) -> list[str]:
    """Questions for an exam without pictures: those of `UNHEARD`, then some of the world."""
    texts = list(UNHEARD[:number])
    for seed in range(first_seed, first_seed + number - len(texts)):
        rng = np.random.default_rng([seed, 47])
        texts.append(pick(rng, draw_questions(sample_scene(seed), rng)).text)
    return texts
