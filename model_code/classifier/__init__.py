"""The library behind the entry points. Nothing is imported here: the server must not pull in torch."""
