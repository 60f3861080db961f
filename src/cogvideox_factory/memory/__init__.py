"""The ways to spend less memory, in a table that says when each applies, how, and what it costs; and what counts it."""
