"""Files of a person: read and checked as a whole before anything is stored."""
