"""The embedded world: film reviews and instructions, generated from plain files in data/world with fixed seeds.

lexicon.py      the words and sentence templates, read from data/world
language.py     facts of the world (films, requests), sentence generation, and the grammar that parses sentences
writers.py      replies to a request: good ones, flawed ones, and typical output of a base model
tasks.py        small multiple-choice tasks
annotators.py   simulated annotators who rank replies, with preferences, noise and ties
gold.py         the gold judge, which no training step sees
parts.py        the tables that recipes name as world:PART or world:PART/validation
"""
