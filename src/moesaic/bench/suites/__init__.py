"""The suites; a module here with a `SUITE` is registered by being here."""
