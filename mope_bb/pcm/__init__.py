"""The Preference Control Model and everything that one token step needs."""
