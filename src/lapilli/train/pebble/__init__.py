"""Pebble's world: scenes, their pictures, questions with exact answers; knows no model."""
