"""A backend for amoeba that lives in a package of its own."""
