"""How people ask, as data: several English wordings for each kind of question; knows no scene.

`{a}` and `{b}` stand for references ("the red circle"), `{things}` for a plural ("red stars"),
`{one}` for an indefinite phrase ("a red star"), `{place}` for a place with a preposition, `{side}`
for "left of".
"""

from typing import Final

DESCRIBE: Final = (
    "Describe the image.",
    "Describe this picture.",
    "Describe the picture in detail.",
    "Describe this image in detail.",
    "Please describe the picture.",
    "Can you describe this image?",
    "Give a full description of the picture.",
    "Describe everything in the image.",
    "What is where in this picture?",
    "Tell me everything about this picture.",
)
LIST: Final = (
    "What is in this picture?",
    "What is in the picture?",
    "What is in this image?",
    "What is in the image?",
    "What do you see?",
    "What can you see in this picture?",
    "What is this?",
    "What does the picture show?",
    "What does this image show?",
    "What is shown here?",
    "What is drawn here?",
    "Which objects are in the picture?",
    "What's in this picture?",
)
COUNT_ALL: Final = (
    "How many objects are there?",
    "How many objects are in the picture?",
    "How many shapes are there?",
    "How many shapes do you see?",
    "How many things are in this image?",
    "How many things are there?",
    "Count the objects.",
    "Count the shapes.",
    "What is the number of objects?",
    "How many objects can you see?",
)
COUNT: Final = (
    "How many {things} are there?",
    "How many {things} are in the picture?",
    "How many {things} do you see?",
    "How many {things} can you see?",
    "Count the {things}.",
    "What is the number of {things}?",
)
COLOUR: Final = (
    "What colour is {a}?",
    "Which colour is {a}?",
    "What is the colour of {a}?",
    "What color is {a}?",
    "Tell me the colour of {a}.",
    "Which colour does {a} have?",
)
SHAPE: Final = (
    "What shape is {a}?",
    "Which shape is {a}?",
    "What is the shape of {a}?",
    "Tell me the shape of {a}.",
    "Which shape does {a} have?",
)
SIZE: Final = (
    "What size is {a}?",
    "How big is {a}?",
    "Is {a} small or large?",
    "Is {a} large or small?",
    "What is the size of {a}?",
    "How large is {a}?",
)
PLACE: Final = (
    "Where is {a}?",
    "Where in the picture is {a}?",
    "Where do you see {a}?",
    "In which part of the picture is {a}?",
    "What is the place of {a}?",
    "Where is {a} in the image?",
)
WHAT_AT: Final = (
    "What is {place}?",
    "What do you see {place}?",
    "What is {place} of the picture?",
    "Which object is {place}?",
)
IS_SIDE: Final = (
    "Is {a} {side} {b}?",
    "Is {a} {side} {b} in the picture?",
    "Do you see {a} {side} {b}?",
)
WHAT_SIDE: Final = (
    "What is {side} {b}?",
    "What do you see {side} {b}?",
    "Which objects are {side} {b}?",
    "What is there {side} {b}?",
)
WHAT_SIDE_IT: Final = (
    "And what is {side} it?",
    "What is {side} it?",
    "And {side} it?",
    "What do you see {side} it?",
)
SIDES: Final = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
EXISTS: Final = (
    "Is there {one}?",
    "Is there {one} in the picture?",
    "Do you see {one}?",
    "Can you see {one}?",
    "Does the picture show {one}?",
    "Is {one} in this image?",
)
HAS_COLOUR: Final = (
    "Is {a} {colour}?",
    "Is the colour of {a} {colour}?",
    "Is {a} {colour} in colour?",
)
HAS_SIZE: Final = ("Is {a} {size}?", "Is {a} a {size} one?")
ANY_AT: Final = (
    "Is there anything {place}?",
    "Is there something {place}?",
    "Is there an object {place}?",
    "Do you see anything {place}?",
)
READ: Final = (
    "What does it say?",
    "What does the picture say?",
    "What is written here?",
    "What is written in the picture?",
    "Read the text.",
    "What text is in the image?",
    "What does the text say?",
    "Can you read this?",
    "Please read the text.",
    "What do you read?",
)
READ_WORD: Final = (
    "Which word is this?",
    "What word is this?",
    "Read the word.",
    "What is the word?",
)
READ_NUMBER: Final = (
    "Which number is this?",
    "What number is this?",
    "Read the number.",
    "What is the number?",
    "Which number is in the picture?",
)
DIGIT: Final = (
    "Which digit is this?",
    "What digit is this?",
    "Which digit do you see?",
    "Read the digit.",
    "What is the digit?",
    "Which number is this?",
    "What number is this?",
    "What does it say?",
    "What is written here?",
    "Which digit was written here?",
    "Can you read this digit?",
)
