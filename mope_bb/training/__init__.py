"""Everything that changes the Preference Control Model."""
