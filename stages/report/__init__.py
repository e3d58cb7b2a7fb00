"""Reports of runs as HTML pages: verdicts, tables, figures and completions."""
