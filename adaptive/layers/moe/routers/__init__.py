"""Expert routers, one file each, found by its name: a dataclass `Settings` below `adaptive.layers.moe.settings.
RouterSettings`, and a class `Router`, or `Layer` where its experts are of a kind of their own."""
