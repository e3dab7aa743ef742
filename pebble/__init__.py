"""The making of pebble, the model that lapilli ships: a program that uses lapilli as a library.

python -m pebble                                  from nothing
python -m pebble --recipes pebble/recipes/warm    on from the embedded pebble

scene, draw, questions, ...    its world: scenes, their pictures, questions with exact answers
recipe, run, tower, talk       its stages, which lapilli's trainer runs as tasks
score, examine, boundary       its exam, and where its world ends
"""
