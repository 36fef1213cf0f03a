"""The demo: what its tabs do (`model`), the page around them (`app`), and the files of a Space (`space/`)."""
