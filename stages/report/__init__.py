"""What an evaluation found, for people: win rates, tables, a page."""
