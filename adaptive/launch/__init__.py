"""Several processes of one run on this machine, and templates for clusters: `python -m adaptive.launch`.

The files are those of the repository's launch/, wherever it lies.
"""

from adaptive.shipped import folder

__path__ = [str(folder("launch"))]
