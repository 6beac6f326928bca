"""Models of this package that no other family has, as `adaptive convert --export` writes them."""

from adaptive.interop.custom import Custom

FAMILY = Custom()
