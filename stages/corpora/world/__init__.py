"""The embedded world: film reviews with instructions, made from plain files in data/world by seeded generators.

lexicon.py      the words and sentence forms, read from data/world
language.py     facts of the world (films, requests) and sentences as it writes them; also reads sentences back
writers.py      replies to a request: good ones, flawed ones, and what a base model would write
tasks.py        small multiple-choice tasks
annotators.py   simulated people who rank replies, with tastes, noise and ties
gold.py         the gold judge, which no training step sees
parts.py        the tables that recipes name as world:PART or world:PART/validation
"""
