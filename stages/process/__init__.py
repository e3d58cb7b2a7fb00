"""What a process is: its devices and seeds, how several are started, how one is asked to end, what it may print."""
