"""What tasks and experts do to one another, measured into tidy tables that a report or a notebook can read."""
