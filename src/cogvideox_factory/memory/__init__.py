"""The ways to spend less memory: a table that says when each applies, how, and what it costs."""
