"""Pictures of a run, written as PNG. Nothing here needs a display; matplotlib is imported when a picture is drawn."""
