"""The run store: what every finished run left behind, under a name that says what decided it."""
