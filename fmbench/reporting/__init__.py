"""What a run tells while it goes: a bar and lines to people, JSON lines, events and trackers to programs."""
