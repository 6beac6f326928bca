"""The report of a run: one self-contained page made of the files in its workdir."""
