"""What a training run needs beside the losses: a teacher, live or on disk, schedules, diagnostics, checks of values."""
