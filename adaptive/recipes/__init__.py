"""The recipes that come with the package, and what families of them share: `from adaptive.recipes.bases import mor`.

The files are those of the repository's recipes/, wherever it lies.
"""

from adaptive.shipped import folder

__path__ = [str(folder("recipes"))]
