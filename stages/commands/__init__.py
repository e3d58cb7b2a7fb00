"""The commands of the program. Their modules start fast: each command imports what it needs when it runs."""
