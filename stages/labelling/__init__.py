"""People who rank: tasks are published, a page asks, every answer is kept, and reports say how far people agree."""
