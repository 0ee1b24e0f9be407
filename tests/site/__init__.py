"""A tiny site for the tests of servers: a view that spawns tasks, each of which writes a row."""
