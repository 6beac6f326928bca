"""Where the packages lie; all else is in pyproject.toml.

recipes/ and launch/ become part of the package, as adaptive._recipes and adaptive._launch (adaptive/shipped.py): as
packages of their own they would meet folders of the same names in users' projects.
"""

from setuptools import find_packages, setup

CARRIED = {"adaptive._recipes": "recipes", "adaptive._launch": "launch"}

setup(packages=[*find_packages(include=["adaptive*", "kernels_pallas*"]), *CARRIED], package_dir=CARRIED)
