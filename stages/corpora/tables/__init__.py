"""Tables: file formats, the files of a folder, and data sets of the Hub."""
